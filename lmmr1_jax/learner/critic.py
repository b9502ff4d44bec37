"""The critic: a value for the state before every completion token, from the tokens and the images before it.

It is a vector [D] and the hidden states that it is multiplied with: the policy's own, or those of a second model
without a head of logits. Its parameters are a tree like the policy's:

    shared   score/kernel [D, 1]
    own      score/kernel [D, 1], language/..., vision/...
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from lmmr1_jax.config.schema import LearnerConfig, TrainConfig
from lmmr1_jax.models.packed_forward import response_hidden
from lmmr1_jax.types.batches import PackedBatch

SCORE = "score"
_SEED = 0x5C03E


@dataclasses.dataclass(frozen=True)
class Critic:
    """A critic without its parameters.

    Attributes:
      backbone: a `models.network.Network` of its own without a head of logits; None shares the policy's.
      abstract_params: nested dict of `jax.ShapeDtypeStruct`.
      axes: the same with the logical axes of every parameter.
    """

    backbone: Any
    abstract_params: dict[str, Any]
    axes: dict[str, Any]

    def values(
        self, policy: Any, policy_params: dict[str, Any], params: dict[str, Any], micro: PackedBatch, mesh: Mesh
    ) -> Float[Array, "rows slots"]:
        """Values of a micro-batch's response slots, float32; padding slots hold numbers without meaning."""
        model = policy.bind(policy_params) if self.backbone is None else self.backbone.bind(_without_head(params))
        return values_of(response_hidden(model, micro, mesh), params)


def shared_critic(policy: Any) -> Critic:
    """A value head on the hidden states of the policy, a `models.network.Network`."""
    return Critic(None, *_head(policy))


def own_critic(backbone: Any, axes: dict[str, Any]) -> Critic:
    """A critic with its own backbone, whose parameters have these logical axes."""
    head, head_axes = _head(backbone)
    return Critic(backbone, backbone.abstract_params | head, axes | head_axes)


def values_of(hidden: Float[Array, "rows slots embed"], params: dict[str, Any]) -> Float[Array, "rows slots"]:
    """v = hidden . score, in float32."""
    kernel = params[SCORE]["kernel"][:, 0]
    return jnp.einsum("rsd,d->rs", hidden.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST)


def initial_head(seed: int, width: int) -> dict[str, Any]:
    """A value head with which no state is worth much: N(0, 1 / (width + 1)^2), as LMM-R1 has it."""
    key = jax.random.fold_in(jax.random.key(seed % 2**32), _SEED)
    return {SCORE: {"kernel": jax.random.normal(key, (width, 1), jnp.float32) / (width + 1)}}


def with_gradient_scaled(x: Array, weight: float) -> Array:
    """`x`, through which a gradient comes back multiplied by `weight`."""
    frozen = jax.lax.stop_gradient(x)
    return frozen + weight * (x - frozen)


def optimizer_config(config: TrainConfig) -> LearnerConfig:
    """The learner's config with what the critic has otherwise."""
    critic = config.critic
    return dataclasses.replace(
        config.learner,
        learning_rate=critic.learning_rate,
        warmup_ratio=critic.warmup_ratio,
        max_grad_norm=critic.max_grad_norm,
    )


def _head(network: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    shape = jax.ShapeDtypeStruct((network.config.text.hidden_size, 1), jnp.float32)
    return {SCORE: {"kernel": shape}}, {SCORE: {"kernel": ("embed", None)}}


def _without_head(params: dict[str, Any]) -> dict[str, Any]:
    return {name: tree for name, tree in params.items() if name != SCORE}
