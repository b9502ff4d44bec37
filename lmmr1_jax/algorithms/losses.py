"""The loss of a micro-batch: the policy's surrogate, the KL where it belongs to the loss, and the entropy bonus.

Everything here is a sum over the tokens given, each with its share of a whole that is counted over the minibatch
before the first forward pass. Hence the sum over micro-batches is the loss of the minibatch, whichever way it was cut.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lmmr1_jax.algorithms.completion_sums import completion_sums
from lmmr1_jax.algorithms.importance import importance_weights
from lmmr1_jax.algorithms.kl import kl_per_token
from lmmr1_jax.algorithms.loss_inputs import LossInputs, LossOutputs
from lmmr1_jax.algorithms.registry import policy_loss
from lmmr1_jax.config.schema import AlgorithmConfig

METRICS = ("loss/policy", "kl", "clip_fraction", "importance/mean", "importance/clipped", "entropy")
"""What a loss tells. But for `loss/policy`, means over the minibatch's tokens, whatever the loss is made of."""


def loss(inputs: LossInputs, config: AlgorithmConfig) -> LossOutputs:
    """sum_t share_t (w_t policy_t + beta kl_t - entropy_bonus H_t).

    share_t is the token's weight in the average (`token_shares`), policy_t the algorithm's surrogate or the
    one that `algorithm.loss` names (`registry.policy_loss`), and w_t corrects that for the sampler
    (`importance_weights`).

    Args:
      inputs: the micro-batch.
      config: resolved; reads `loss` and its bounds, `aggregation`, `importance`, and what of KL and entropy is asked
        for.
    """
    share = token_shares(inputs, config)
    surrogate, held_back = policy_loss(config)(inputs, config)
    weight, cut = importance_weights(inputs.old_log_probs, inputs.sampler_log_probs, inputs.completion, config)
    policy = _sum(weight * surrogate, share)
    total, kl = policy, jnp.zeros_like(inputs.log_probs)
    if inputs.reference_log_probs is not None:
        kl = kl_per_token(inputs.log_probs - inputs.reference_log_probs, config.kl_estimator)
        if config.kl_placement == "loss":
            total = total + inputs.kl_coefficient * _sum(kl, share)
    if config.entropy_bonus:
        total = total - config.entropy_bonus * _sum(inputs.entropy, share)
    per_token = (kl, held_back, weight, cut, inputs.entropy)
    means = [_sum(values, inputs.mask / inputs.tokens_total) for values in per_token]
    return LossOutputs(total, jax.lax.stop_gradient(dict(zip(METRICS, [policy, *means], strict=True))))


def token_shares(inputs: LossInputs, config: AlgorithmConfig) -> Float[Array, "rows slots"]:
    """The weight of every token in the minibatch's average; 0 at padding.

        token      1 / T, of all T completion tokens: a long completion weighs more than a short one
        sequence   1 / (N |y|): the mean over N completions of the mean over the |y| tokens of each
        constant   1 / (N L): the same with one length L for all, so that a token weighs the same wherever it stands
                   and however many others there are (Dr. GRPO, arXiv:2503.20783)
    """
    if config.aggregation == "token":
        return inputs.mask / inputs.tokens_total
    if config.aggregation == "constant":
        return inputs.mask / (inputs.completions_total * config.aggregation_length)
    length = completion_sums(inputs.mask, inputs.completion)
    return inputs.mask / (inputs.completions_total * jnp.maximum(length, 1.0))


def _sum(values: Float[Array, "rows slots"], share: Float[Array, "rows slots"]) -> Float[Array, ""]:
    # where, not only a product: a padding slot may hold an infinity, and 0 * inf is not 0.
    return jnp.sum(jnp.where(share > 0, values, 0.0) * share)
