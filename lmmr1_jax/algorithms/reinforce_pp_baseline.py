"""REINFORCE++-baseline: the group's mean taken off, then the batch's standard deviation (Hu et al. 2025,
arXiv:2501.03262, section on "REINFORCE++ with baseline")."""

from __future__ import annotations

from collections.abc import Sequence

from lmmr1_jax.algorithms.shaping import Tokens, less_the_mean, shaped_advantages
from lmmr1_jax.config.schema import AlgorithmConfig
from lmmr1_jax.types.records import Rollout


def advantages(
    rollouts: Sequence[Rollout], config: AlgorithmConfig, log_ratios: Sequence[Tokens] | None = None
) -> list[Rollout]:
    """r'_i = r_i - mean of its group;  A = (r' - mean) / std over the batch's tokens.

    The group says what its prompt is worth, the batch how large rewards are: a group in which one completion differs
    by little is not blown up, as it is by GRPO. Arguments as in `shaped_advantages`.
    """
    return shaped_advantages(rollouts, config, log_ratios, less_the_mean)
