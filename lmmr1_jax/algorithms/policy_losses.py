"""What a token's log-prob is weighed by: the surrogates of the policy gradient, one number per token.

Every one of them has the gradient -A_t grad log p_t where the ratio is 1, and differs in what holds it back when the
policy has moved away from the one that the ratio divides by.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lmmr1_jax.algorithms.completion_sums import completion_sums
from lmmr1_jax.algorithms.loss_inputs import LossInputs
from lmmr1_jax.config.schema import AlgorithmConfig

_LOG_RATIO_LIMIT = 20.0

PerToken = Float[Array, "rows slots"]
PolicyLoss = Callable[[LossInputs, AlgorithmConfig], tuple[PerToken, PerToken]]


def clip(inputs: LossInputs, config: AlgorithmConfig) -> tuple[PerToken, PerToken]:
    """PPO's clipped surrogate (Schulman et al. 2017, arXiv:1707.06347, eq. 7), bounds of its own on either side
    (DAPO, arXiv:2503.14476, eq. 8), and the dual clip (Ye et al. 2020, arXiv:1912.09729, eq. 5).

        ratio_t = exp(lp_t - old_t)
        J_t     = min(ratio_t A_t, clip(ratio_t, 1 - clip_low, 1 + clip_high) A_t)
        J_t     = max(J_t, dual_clip A_t)   where A_t < 0 and dual_clip > 0
        loss_t  = -J_t

    Returns the losses and where the clip holds back (1 or 0).
    """
    return _clipped(_ratio(inputs.log_probs - inputs.old_log_probs), inputs, config)


def gspo(inputs: LossInputs, config: AlgorithmConfig) -> tuple[PerToken, PerToken]:
    """GSPO: the ratio of a whole completion, its length taken out (Zheng et al. 2025, arXiv:2507.18071).

        s   = exp(mean over the completion of lp_t - old_t)
        s_t = stopped(s) * p_t / stopped(p_t);  then as `clip`, with s_t for the ratio

    s_t has the value of s and the gradient of s, spread over the tokens (its eq. 14, GSPO-token), so that advantages
    may differ from token to token. With `aggregation sequence` this is eq. 5 of the paper.
    """
    log_ratio = jax.lax.stop_gradient(inputs.log_probs - inputs.old_log_probs)
    length = completion_sums(inputs.mask, inputs.completion)
    mean = completion_sums(log_ratio, inputs.completion) / jnp.maximum(length, 1.0)
    moving = inputs.log_probs - jax.lax.stop_gradient(inputs.log_probs)
    return _clipped(_ratio(mean + jnp.where(inputs.mask > 0, moving, 0.0)), inputs, config)


def cispo(inputs: LossInputs, config: AlgorithmConfig) -> tuple[PerToken, PerToken]:
    """CISPO: the ratio is clipped as a weight and no token loses its gradient (MiniMax-M1, arXiv:2506.13585, eq. 4).

    loss_t = -stopped(clip(ratio_t, 1 - clip_low, 1 + clip_high)) A_t lp_t
    """
    ratio = jax.lax.stop_gradient(_ratio(inputs.log_probs - inputs.old_log_probs))
    weight = jnp.clip(ratio, 1.0 - config.clip_low, 1.0 + config.clip_high)
    return -weight * inputs.advantages * inputs.log_probs, (weight != ratio).astype(jnp.float32)


def policy_gradient(inputs: LossInputs, config: AlgorithmConfig) -> tuple[PerToken, PerToken]:
    """REINFORCE (Williams 1992): loss_t = -A_t lp_t. Nothing corrects for a policy that has moved."""
    return -inputs.advantages * inputs.log_probs, jnp.zeros_like(inputs.log_probs)


POLICY_LOSSES: dict[str, PolicyLoss] = {
    "clip": clip,
    "gspo": gspo,
    "cispo": cispo,
    "policy_gradient": policy_gradient,
}


def _ratio(log_ratio: PerToken) -> PerToken:
    # Far outside any clip range: a token whose probability collapsed gives a large number and not infinity.
    return jnp.exp(jnp.clip(log_ratio, -_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT))


def _clipped(ratio: PerToken, inputs: LossInputs, config: AlgorithmConfig) -> tuple[PerToken, PerToken]:
    whole = ratio * inputs.advantages
    kept = jnp.minimum(whole, jnp.clip(ratio, 1.0 - config.clip_low, 1.0 + config.clip_high) * inputs.advantages)
    if config.dual_clip:
        kept = jnp.where(inputs.advantages < 0, jnp.maximum(kept, config.dual_clip * inputs.advantages), kept)
    return -kept, (kept != whole).astype(jnp.float32)
