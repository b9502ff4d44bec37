"""Importance sampling against the sampler: what was drawn by other weights, or by another program, than the learner's.

The sampler drew a token with probability q_t; the learner, with the weights that the update starts from, gives it
p_t (`old`). Even at equal weights an engine with kernels of its own computes other numbers, and with weights that are
some updates old the difference is no rounding any more. An expectation over q becomes one over p through w = p / q.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lmmr1_jax.algorithms.completion_sums import completion_sums
from lmmr1_jax.config.schema import AlgorithmConfig

_LOG_WEIGHT_LIMIT = 20.0


def importance_weights(
    old_log_probs: Float[Array, "rows slots"],
    sampler_log_probs: Float[Array, "rows slots"],
    completion: Int[Array, "rows slots"],
    config: AlgorithmConfig,
) -> tuple[Float[Array, "rows slots"], Float[Array, "rows slots"]]:
    """The weight of every token in the policy's loss, gradient stopped, and where it was held back (1 or 0).

        token            w_t = min(p_t / q_t, cap)                          (Yao et al. 2025, "Your efficient RL
        sequence         w_t = min(prod over the completion of p/q, cap)     framework secretly brings you off-policy
        masked_token     w_t = p_t / q_t, 0 outside [1 / cap, cap]           RL training"; masked: IcePop, Ling Team
        masked_sequence  the same with the completion's product              2025, arXiv:2510.18855)
        none             w_t = 1

    A dropped token still counts in the denominators, which are known before any forward pass. The log of a weight is
    held within +-20. Padding slots hold numbers without meaning.

    Args:
      old_log_probs: policy log-probs that the probability ratio divides by, of the learner, never the sampler's.
      sampler_log_probs: policy log-probs of the sampler.
      completion: the completion of each slot, -1 for padding.
      config: reads `importance` and `importance_cap`.
    """
    if config.importance == "none":
        return jnp.ones_like(old_log_probs), jnp.zeros_like(old_log_probs)
    log_weight = jax.lax.stop_gradient(old_log_probs - sampler_log_probs)
    if config.importance in ("sequence", "masked_sequence"):
        log_weight = completion_sums(log_weight, completion)
    weight = jnp.exp(jnp.clip(log_weight, -_LOG_WEIGHT_LIMIT, _LOG_WEIGHT_LIMIT))
    too_large = weight > config.importance_cap
    if config.importance in ("token", "sequence"):
        return jnp.minimum(weight, config.importance_cap), too_large.astype(jnp.float32)
    outside = too_large | (weight < 1.0 / config.importance_cap)
    return jnp.where(outside, 0.0, weight), outside.astype(jnp.float32)
