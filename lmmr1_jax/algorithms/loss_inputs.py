"""What a loss sees of a micro-batch, and what it gives back."""

from __future__ import annotations

import dataclasses

from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class LossInputs:
    """What a loss sees of a micro-batch.

    Attributes:
      log_probs: float32, policy log-probs of the weights being trained.
      entropy: float32, of the distribution that each token was drawn from. These two have gradients.
      old_log_probs: float32, what the probability ratio divides by.
      sampler_log_probs: float32, by the sampler, for the importance-sampling correction.
      reference_log_probs: float32, of the starting policy; None where no KL is asked for.
      advantages: float32.
      mask: float32, 1 at completion tokens.
      completion: int32, the completion that a slot belongs to, -1 for padding; a completion's slots stand side by
        side in one row.
      tokens_total: completion tokens in the whole minibatch.
      completions_total: completions in the whole minibatch.
      kl_coefficient: beta. Data, not a constant: an adaptive one changes from step to step.
    """

    log_probs: Float[Array, "rows slots"]
    entropy: Float[Array, "rows slots"]
    old_log_probs: Float[Array, "rows slots"]
    sampler_log_probs: Float[Array, "rows slots"]
    reference_log_probs: Float[Array, "rows slots"] | None
    advantages: Float[Array, "rows slots"]
    mask: Float[Array, "rows slots"]
    completion: Int[Array, "rows slots"]
    tokens_total: Float[Array, ""]
    completions_total: Float[Array, ""]
    kl_coefficient: Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class LossOutputs:
    """This micro-batch's share of the minibatch's loss, and shares of metrics that add up in the same way.

    Attributes:
      loss: what is differentiated.
      metrics: shares of `losses.METRICS`.
    """

    loss: Float[Array, ""]
    metrics: dict[str, Float[Array, ""]]
