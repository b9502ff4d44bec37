"""DAPO's dynamic sampling (Yu et al. 2025, arXiv:2503.14476, eq. 11): a step learns from groups that teach something.

Where all completions of a prompt earned the same, the group's advantages are 0. Such groups are replaced by those of
fresh prompts, sampled by the same weights, a whole batch at a time so that no shape is new.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lmmr1_jax.types.records import Rollout


def replace_equal_groups(
    groups: Sequence[Rollout], more: Callable[[int], Sequence[Rollout]], rounds: int
) -> tuple[list[Rollout], dict[str, float]]:
    """As many groups as were given, those with different rewards first, in the order in which they were sampled.

    Fresh batches come in until there are enough groups that differ, at most `rounds` of them; groups without variance
    fill what is missing then. What is left over is dropped, for the next step has other weights. The result follows
    from the arguments alone.

    Args:
      groups: the step's groups with their rewards.
      more: another batch of groups with rewards, for round 1, 2, ...
      rounds: batches of fresh prompts at most.

    Returns:
      The groups, and the metrics `dynamic/rounds` (fresh batches) and `dynamic/dropped` (groups that were sampled and
      are not learned from).
    """
    sampled, used = list(groups), 0
    while used < rounds and sum(map(differs, sampled)) < len(groups):
        used += 1
        sampled += more(used)
    kept = sorted(sampled, key=lambda group: not differs(group))[: len(groups)]
    return kept, {"dynamic/rounds": float(used), "dynamic/dropped": float(len(sampled) - len(kept))}


def differs(group: Rollout) -> bool:
    """Whether the group's completions earned different rewards in total."""
    return len({reward.total for reward in group.rewards}) > 1
