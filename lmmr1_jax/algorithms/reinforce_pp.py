"""REINFORCE++: no baseline but the batch's mean, KL per token (Hu et al. 2025, arXiv:2501.03262)."""

from __future__ import annotations

from collections.abc import Sequence

from lmmr1_jax.algorithms.shaping import Tokens, shaped_advantages
from lmmr1_jax.config.schema import AlgorithmConfig
from lmmr1_jax.types.records import Rollout


def advantages(
    rollouts: Sequence[Rollout], config: AlgorithmConfig, log_ratios: Sequence[Tokens] | None = None
) -> list[Rollout]:
    """G_t = sum over s >= t of discount^(s - t) ([s is last] r_i - beta kl_s);  A = (G - mean) / std over the batch's
    tokens.

    One completion per prompt is enough. Arguments as in `shaped_advantages`; reads `discount` too.
    """
    return shaped_advantages(rollouts, config, log_ratios, lambda rewards: rewards, discount=config.discount)
