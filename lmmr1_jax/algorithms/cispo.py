"""CISPO: GRPO's advantages, and a ratio that is clipped as a weight, so that no token loses its gradient (MiniMax-M1,
arXiv:2506.13585)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lmmr1_jax.algorithms import shaping
from lmmr1_jax.algorithms.algorithm import Algorithm, PerToken
from lmmr1_jax.algorithms.loss_inputs import LossInputs
from lmmr1_jax.algorithms.policy_losses import ratio
from lmmr1_jax.algorithms.shaping import group_mean_advantages
from lmmr1_jax.config.schema import AlgorithmConfig


def cispo(inputs: LossInputs, config: AlgorithmConfig) -> tuple[PerToken, PerToken]:
    """loss_t = -stopped(clip(exp(lp_t - old_t), 1 - clip_low, 1 + clip_high)) A_t lp_t (eq. 4)."""
    unclipped = jax.lax.stop_gradient(ratio(inputs.log_probs - inputs.old_log_probs))
    weight = jnp.clip(unclipped, 1.0 - config.clip_low, 1.0 + config.clip_high)
    return -weight * inputs.advantages * inputs.log_probs, (weight != unclipped).astype(jnp.float32)


ALGORITHM = Algorithm(
    "cispo",
    advantages=group_mean_advantages,
    loss=cispo,
    # The paper has no lower bound and names no upper one: weights from 0 to 5.
    defaults={"clip_low": 1.0, "clip_high": 4.0, "normalize_advantages": "group"},
    reads=shaping.READS,
)
