"""The policy gradient: completions become more likely by their advantages."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from lmmr1_jax.algorithms import losses
from lmmr1_jax.algorithms.loss_inputs import LossInputs
from lmmr1_jax.config.schema import AlgorithmConfig
from lmmr1_jax.learner.objective import Metrics
from lmmr1_jax.learner.state import POLICY
from lmmr1_jax.models.network import Network, Params, Transformer
from lmmr1_jax.models.packed_forward import SamplingDistribution, log_probs_of, response_hidden, response_log_probs
from lmmr1_jax.types.batches import PackedBatch


@dataclasses.dataclass(frozen=True)
class PolicyGradient:
    """The loss of `algorithms.losses` for the policy alone.

    Metrics, all over the minibatch's completion tokens: `losses.METRICS` (`kl` by the config's estimator, 0 without a
    reference), and `gap/mean` and `gap/max`, the learner's against the sampler's log-probs before the update.

    Attributes:
      network: the policy without parameters.
      distribution: what the completions were drawn from.
      algorithm: resolved; see `losses.loss`.
      mesh: where rows are split.
      on_policy: one update per rollout, so that the ratio divides by the same forward pass.
      with_reference: the batch's reference log-probs are read.
    """

    network: Network
    distribution: SamplingDistribution
    algorithm: AlgorithmConfig
    mesh: Mesh
    on_policy: bool
    with_reference: bool

    trains = (POLICY,)

    def loss(self, params: Mapping[str, Params], micro: PackedBatch) -> tuple[Float[Array, ""], Metrics]:
        """See `Objective`."""
        model = self.network.bind(params[POLICY])
        return self.loss_of(model, response_hidden(model, micro, self.mesh), micro)

    def loss_of(
        self, model: Transformer, hidden: Float[Array, "rows slots embed"], micro: PackedBatch
    ) -> tuple[Float[Array, ""], Metrics]:
        """The same from hidden states of response slots, which a value head may read as well."""
        log_probs, entropy = log_probs_of(model, hidden, micro, self.distribution, self.mesh)
        # On the policy that sampled, ratio 1 is exact: the very same numbers, gradient stopped.
        old = jax.lax.stop_gradient(log_probs) if self.on_policy else micro.old_log_probs
        out = losses.loss(
            LossInputs(
                log_probs=log_probs,
                entropy=entropy,
                old_log_probs=old,
                sampler_log_probs=micro.sampler_log_probs,
                reference_log_probs=micro.reference_log_probs if self.with_reference else None,
                advantages=micro.advantages,
                mask=micro.mask,
                completion=micro.completion,
                tokens_total=micro.tokens_total,
                completions_total=micro.completions_total,
                kl_coefficient=micro.kl_coefficient,
            ),
            self.algorithm,
        )
        gap = jnp.where(micro.mask > 0, jnp.abs(jax.lax.stop_gradient(log_probs) - micro.sampler_log_probs), 0.0)
        gaps = {"gap/mean": jnp.sum(gap) / micro.tokens_total, "gap/max": jnp.max(gap)}
        return out.loss, out.metrics | gaps

    def log_probs(self, params: Mapping[str, Params], micro: PackedBatch) -> Float[Array, "rows slots"]:
        """Policy log-probs of a micro-batch's response slots; padding slots hold numbers without meaning."""
        return response_log_probs(self.network, params[POLICY], micro, self.distribution, self.mesh)[0]
