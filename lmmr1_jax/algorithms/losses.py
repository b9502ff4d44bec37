"""Losses as pure functions: a `LossInputs` in, a `LossOutputs` out.

Everything here is a sum over the tokens given, divided by a count over the whole minibatch that is known before the
first forward pass. Hence the sum over micro-batches is the loss of the minibatch, whichever way it was cut.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lmmr1_jax.algorithms.importance import importance_weights
from lmmr1_jax.algorithms.kl import kl_per_token
from lmmr1_jax.config import AlgorithmConfig

_LOG_RATIO_LIMIT = 20.0


@dataclasses.dataclass(frozen=True)
class LossInputs:
    """What a loss sees of a micro-batch.

    Attributes:
      log_probs: float32, policy log-probs of the weights being trained; the only field with a gradient.
      old_log_probs: float32, what the probability ratio divides by.
      sampler_log_probs: float32, by the sampler, for the importance-sampling correction.
      reference_log_probs: float32, of the starting policy; None where no KL is asked for.
      advantages: float32.
      mask: float32, 1 at completion tokens.
      completion: int32, the completion that a slot belongs to, -1 for padding; a completion's slots stand side by
        side in one row.
      tokens_total: completion tokens in the whole minibatch.
    """

    log_probs: Float[Array, "rows slots"]
    old_log_probs: Float[Array, "rows slots"]
    sampler_log_probs: Float[Array, "rows slots"]
    reference_log_probs: Float[Array, "rows slots"] | None
    advantages: Float[Array, "rows slots"]
    mask: Float[Array, "rows slots"]
    completion: Int[Array, "rows slots"]
    tokens_total: Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class LossOutputs:
    """This micro-batch's share of the minibatch's loss, and shares of metrics that add up in the same way.

    Attributes:
      loss: what is differentiated.
      metrics: shares of `loss/policy`, `kl`, `clip_fraction`, `importance/mean` and `importance/clipped`.
    """

    loss: Float[Array, ""]
    metrics: dict[str, Float[Array, ""]]


def clipped_policy_loss(inputs: LossInputs, config: AlgorithmConfig) -> LossOutputs:
    """PPO's clipped surrogate, averaged over the minibatch's tokens, and the KL where it belongs to the loss.

        ratio_t = exp(lp_t - old_t);  pg_t = -min(ratio_t A_t, clip(ratio_t, 1 - e, 1 + e) A_t)
        loss = sum_t w_t pg_t / T  +  beta * sum_t kl_t / T,   T the completion tokens of the whole minibatch

    (Schulman et al. 2017, arXiv:1707.06347, eq. 7.) w_t corrects for the sampler, see `importance_weights`. The log
    of the ratio is held within +-20, far outside the clip range, so that a token whose probability collapsed gives a
    large number and not infinity.
    """
    mask = inputs.mask
    log_ratio = jnp.clip(inputs.log_probs - inputs.old_log_probs, -_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT)
    ratio = jnp.exp(log_ratio)
    unclipped = ratio * inputs.advantages
    clipped = jnp.clip(ratio, 1.0 - config.clip, 1.0 + config.clip) * inputs.advantages
    weight, held_back = importance_weights(inputs.old_log_probs, inputs.sampler_log_probs, inputs.completion, config)
    policy = _share(-weight * jnp.minimum(unclipped, clipped), mask, inputs.tokens_total)
    metrics = {
        "loss/policy": policy,
        "clip_fraction": _share((clipped < unclipped).astype(jnp.float32), mask, inputs.tokens_total),
        "importance/mean": _share(weight, mask, inputs.tokens_total),
        "importance/clipped": _share(held_back, mask, inputs.tokens_total),
        "kl": jnp.zeros((), jnp.float32),
    }
    loss = policy
    if inputs.reference_log_probs is not None:
        kl = kl_per_token(inputs.log_probs - inputs.reference_log_probs, config.kl_estimator)
        kl = _share(kl, mask, inputs.tokens_total)
        metrics["kl"] = kl
        if config.kl_placement == "loss":
            loss = loss + config.kl_coefficient * kl
    return LossOutputs(loss, jax.lax.stop_gradient(metrics))


def _share(values: Float[Array, "rows slots"], mask: Float[Array, "rows slots"], total: Float[Array, ""]):
    # where, not a product: a padding slot may hold an infinity, and 0 * inf is not 0.
    return jnp.sum(jnp.where(mask > 0, values, 0.0)) / total
