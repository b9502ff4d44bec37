"""Dr. GRPO: GRPO without the two divisions that bias it (Liu et al. 2025, arXiv:2503.20783)."""

from __future__ import annotations

from collections.abc import Sequence

from lmmr1_jax.algorithms.shaping import Tokens, less_the_mean, shaped_advantages
from lmmr1_jax.config.schema import AlgorithmConfig
from lmmr1_jax.types.records import Rollout


def advantages(
    rollouts: Sequence[Rollout], config: AlgorithmConfig, log_ratios: Sequence[Tokens] | None = None
) -> list[Rollout]:
    """A_i = r_i - mean of its group.

    Dividing by the group's standard deviation favours prompts that are nearly always or nearly never solved; dividing
    by a completion's own length makes wrong completions longer, so the loss divides by a constant length
    (`aggregation constant`). Arguments as in `shaped_advantages`.
    """
    return shaped_advantages(rollouts, config, log_ratios, less_the_mean)
