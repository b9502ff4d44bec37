"""The surrogates of the policy gradient that several algorithms share: one number per token.

Every surrogate has the gradient -A_t grad log p_t where the ratio is 1, and differs in what holds it back when the
policy has moved away from the one that the ratio divides by.
"""

from __future__ import annotations

import jax.numpy as jnp

from lmmr1_jax.algorithms.algorithm import PerToken
from lmmr1_jax.algorithms.loss_inputs import LossInputs
from lmmr1_jax.config.schema import AlgorithmConfig

_LOG_RATIO_LIMIT = 20.0


def clip(inputs: LossInputs, config: AlgorithmConfig) -> tuple[PerToken, PerToken]:
    """PPO's clipped surrogate (Schulman et al. 2017, arXiv:1707.06347, eq. 7), bounds of its own on either side
    (DAPO, arXiv:2503.14476, eq. 8), and the dual clip (Ye et al. 2020, arXiv:1912.09729, eq. 5).

        ratio_t = exp(lp_t - old_t)
        J_t     = min(ratio_t A_t, clip(ratio_t, 1 - clip_low, 1 + clip_high) A_t)
        J_t     = max(J_t, dual_clip A_t)   where A_t < 0 and dual_clip > 0
        loss_t  = -J_t

    Returns the losses and where the clip holds back (1 or 0).
    """
    return clipped(ratio(inputs.log_probs - inputs.old_log_probs), inputs, config)


def policy_gradient(inputs: LossInputs, config: AlgorithmConfig) -> tuple[PerToken, PerToken]:
    """REINFORCE (Williams 1992): loss_t = -A_t lp_t. Nothing corrects for a policy that has moved."""
    return -inputs.advantages * inputs.log_probs, jnp.zeros_like(inputs.log_probs)


def ratio(log_ratio: PerToken) -> PerToken:
    """exp(log_ratio), the exponent held within +-20: far outside any clip range, a token whose probability collapsed
    gives a large number and not infinity."""
    return jnp.exp(jnp.clip(log_ratio, -_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT))


def clipped(ratio: PerToken, inputs: LossInputs, config: AlgorithmConfig) -> tuple[PerToken, PerToken]:
    """`clip` with any ratio."""
    whole = ratio * inputs.advantages
    kept = jnp.minimum(whole, jnp.clip(ratio, 1.0 - config.clip_low, 1.0 + config.clip_high) * inputs.advantages)
    if config.dual_clip:
        kept = jnp.where(inputs.advantages < 0, jnp.maximum(kept, config.dual_clip * inputs.advantages), kept)
    return -kept, (kept != whole).astype(jnp.float32)
