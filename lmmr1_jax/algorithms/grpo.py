"""GRPO: rewards normalised within their group (Shao et al. 2024, DeepSeekMath, arXiv:2402.03300)."""

from __future__ import annotations

from collections.abc import Sequence

from lmmr1_jax.algorithms.shaping import Tokens, less_the_mean, shaped_advantages
from lmmr1_jax.config.schema import AlgorithmConfig
from lmmr1_jax.types.records import Rollout


def advantages(
    rollouts: Sequence[Rollout], config: AlgorithmConfig, log_ratios: Sequence[Tokens] | None = None
) -> list[Rollout]:
    """A_i = (r_i - mean of its group) / (std of its group + 1e-9), the unbiased standard deviation.

    A group whose rewards are all equal, or that has one member, has advantages of exactly 0. DAPO, GSPO and CISPO
    have the same advantages. Arguments as in `shaped_advantages`.
    """
    return shaped_advantages(rollouts, config, log_ratios, less_the_mean)
