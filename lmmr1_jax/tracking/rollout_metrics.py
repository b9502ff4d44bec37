"""Figures of one step's rollouts: what was earned, how long the completions are, how many groups teach anything."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lmmr1_jax.types.records import FINISH_LENGTH, Rollout


def rollout_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Means over all completions of a step, each completion counted once; names and units are in docs/metrics.md.

    Raises:
      ValueError: a rollout has not been rewarded yet.
    """
    if any(len(rollout.rewards) != len(rollout.completions) for rollout in rollouts):
        raise ValueError("every completion needs its reward before its figures can be counted")
    completions = [completion for rollout in rollouts for completion in rollout.completions]
    rewards = [reward for rollout in rollouts for reward in rollout.rewards]
    if not completions:
        return {}
    lengths = np.array([len(completion.token_ids) for completion in completions])
    totals = np.array([reward.total for reward in rewards])
    metrics = {
        "reward/mean": float(totals.mean()),
        "reward/std": float(totals.std()),
        "reward/faults": float(sum(reward.fault is not None for reward in rewards)),
        "reward/timeouts": float(sum(reward.fault == "timeout" for reward in rewards)),
        "reward/equal_groups": float(np.mean([len({reward.total for reward in r.rewards}) == 1 for r in rollouts])),
        "completion/length": float(lengths.mean()),
        "completion/longest": float(lengths.max()),
        "completion/truncated": float(np.mean([c.finish_reason == FINISH_LENGTH for c in completions])),
    }
    # A faulted completion may lack the parts that nobody could judge: they earned nothing.
    for part in sorted({part for reward in rewards for part in reward.parts}):
        metrics[f"reward/{part}"] = float(np.mean([reward.parts.get(part, 0.0) for reward in rewards]))
    return metrics


def off_policy_steps(rollouts: Sequence[Rollout], done: int) -> dict[str, float]:
    """How many updates the learner, `done` behind it, is ahead of the weights that sampled: mean and most over all
    tokens."""
    versions = np.concatenate([c.policy_version for rollout in rollouts for c in rollout.completions])
    steps = done - versions
    return {"off_policy_steps/mean": float(np.mean(steps)), "off_policy_steps/max": int(np.max(steps))}
