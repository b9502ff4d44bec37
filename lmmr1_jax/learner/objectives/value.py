"""PPO's critic: a value for the state before every completion token, from the tokens and the images before it.

It is a vector [D] and the hidden states that it is multiplied with: the policy's own, or those of a second model
without a head of logits. Its parameters are a trainable of their own:

    shared   score/kernel [D, 1]
    own      score/kernel [D, 1], language/..., vision/...
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from lmmr1_jax.algorithms.value_loss import value_loss
from lmmr1_jax.learner.objective import Metrics
from lmmr1_jax.learner.objectives.policy import PolicyGradient
from lmmr1_jax.learner.state import POLICY
from lmmr1_jax.models.network import Network, Params
from lmmr1_jax.models.packed_forward import response_hidden
from lmmr1_jax.types.batches import PackedBatch

CRITIC = "critic"
SCORE = "score"
_SEED = 0x5C03E


@dataclasses.dataclass(frozen=True)
class Critic:
    """A critic without its parameters.

    Attributes:
      backbone: a network of its own without a head of logits; None shares the policy's.
      abstract_params: nested dict of `jax.ShapeDtypeStruct`.
      axes: the same with the logical axes of every parameter.
    """

    backbone: Network | None
    abstract_params: Params
    axes: dict[str, Any]


def shared_critic(policy: Network) -> Critic:
    """A value head on the hidden states of the policy."""
    return Critic(None, *_head(policy))


def own_critic(backbone: Network, axes: dict[str, Any]) -> Critic:
    """A critic with its own backbone, whose parameters have these logical axes."""
    head, head_axes = _head(backbone)
    return Critic(backbone, backbone.abstract_params | head, axes | head_axes)


@dataclasses.dataclass(frozen=True)
class Value:
    """The loss of `algorithms.value_loss` for a critic with a backbone of its own.

    Metrics: `value_loss.METRICS`.

    Attributes:
      backbone: the critic's network, without a head of logits.
      clip: see `value_loss`.
      mesh: where rows are split.
    """

    backbone: Network
    clip: float
    mesh: Mesh

    trains = (CRITIC,)

    def loss(self, params: Mapping[str, Params], micro: PackedBatch) -> tuple[Float[Array, ""], Metrics]:
        """See `Objective`."""
        return _loss(self.values(params, micro), micro, self.clip)

    def values(self, params: Mapping[str, Params], micro: PackedBatch) -> Float[Array, "rows slots"]:
        """Values of a micro-batch's response slots, float32; padding slots hold numbers without meaning."""
        body = {name: tree for name, tree in params[CRITIC].items() if name != SCORE}
        return values_of(response_hidden(self.backbone.bind(body), micro, self.mesh), params[CRITIC])


@dataclasses.dataclass(frozen=True)
class PolicyGradientAndValue:
    """Both losses from one forward pass, for a value head on the policy's hidden states.

    Attributes:
      policy: the policy's part.
      clip: see `value_loss`.
      weight: of the value loss in the backbone's gradient. The head's own gradient is not weighted, for it has an
        optimizer of its own.
    """

    policy: PolicyGradient
    clip: float
    weight: float

    trains = (POLICY, CRITIC)

    def loss(self, params: Mapping[str, Params], micro: PackedBatch) -> tuple[Float[Array, ""], Metrics]:
        """See `Objective`."""
        model = self.policy.network.bind(params[POLICY])
        hidden = response_hidden(model, micro, self.policy.mesh)
        loss, metrics = self.policy.loss_of(model, hidden, micro)
        values = values_of(with_gradient_scaled(hidden, self.weight), params[CRITIC])
        of_values, more = _loss(values, micro, self.clip)
        return loss + of_values, metrics | more

    def values(self, params: Mapping[str, Params], micro: PackedBatch) -> Float[Array, "rows slots"]:
        """Values of a micro-batch's response slots, float32; padding slots hold numbers without meaning."""
        model = self.policy.network.bind(params[POLICY])
        return values_of(response_hidden(model, micro, self.policy.mesh), params[CRITIC])


def values_of(hidden: Float[Array, "rows slots embed"], params: Params) -> Float[Array, "rows slots"]:
    """v = hidden . score, in float32."""
    kernel = params[SCORE]["kernel"][:, 0]
    return jnp.einsum("rsd,d->rs", hidden.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST)


def initial_head(seed: int, width: int) -> Params:
    """A value head with which no state is worth much: N(0, 1 / (width + 1)^2), as LMM-R1 has it."""
    key = jax.random.fold_in(jax.random.key(seed % 2**32), _SEED)
    return {SCORE: {"kernel": jax.random.normal(key, (width, 1), jnp.float32) / (width + 1)}}


def with_gradient_scaled(x: Array, weight: float) -> Array:
    """`x`, through which a gradient comes back multiplied by `weight`."""
    frozen = jax.lax.stop_gradient(x)
    return frozen + weight * (x - frozen)


def _loss(
    values: Float[Array, "rows slots"], micro: PackedBatch, clip: float
) -> tuple[Float[Array, ""], Metrics]:
    return value_loss(values, micro.values, micro.returns, micro.mask, micro.tokens_total, clip)


def _head(network: Network) -> tuple[Params, dict[str, Any]]:
    shape = jax.ShapeDtypeStruct((network.config.text.hidden_size, 1), jnp.float32)
    return {SCORE: {"kernel": shape}}, {SCORE: {"kernel": ("embed", None)}}
