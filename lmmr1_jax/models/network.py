"""The model as the rest of the project sees it: `build` a `Network`, `bind` parameters to it inside jit, compute.

Parameters are a plain nested dict of float32 arrays, layers stacked on axis 0; modules exist only while a function
is traced. Nothing here knows of meshes: `constrain` is called with activations and their logical axes, and the
learner decides what that means.

    network = build(read_architecture(folder), compute_dtype=jnp.bfloat16, remat="attention")
    params = network.init(jax.random.key(0))

    @jax.jit
    def logits(params, tokens, positions, mask):
        model = network.bind(params)
        hidden = model.hidden(model.embed(tokens), positions, mask)
        return hidden @ model.head_embedding().T
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lmmr1_jax.models.attention.backends import BACKENDS, Attend
from lmmr1_jax.models.attention.mask import KeyIntervals
from lmmr1_jax.models.decoder import SAVED, Decoder, DecoderLayer, rope_angles
from lmmr1_jax.models.families import family_of
from lmmr1_jax.models.layers import bind
from lmmr1_jax.types.batches import VisionBatch
from weights_bridge.architecture import Architecture

Params = dict[str, Any]
Remat = Literal["none", "attention", "full"]
Constrain = Callable[[Array, tuple[str | None, ...]], Array]

INIT_SCALE = 0.02
ACTIVATION_AXES = ("batch", None, None)
"""Logical axes of `[rows, time, width]` activations, as `constrain` gets them."""


def unconstrained(x: Array, axes: tuple[str | None, ...]) -> Array:
    """The `constrain` of a single device."""
    return x


class Transformer(nnx.Module):
    """A language model with or without a vision tower. Make it with `Network.bind`."""

    def __init__(self, config: Architecture, *, dtype: jnp.dtype, remat: Remat, constrain: Constrain, attend: Attend):
        self.language = Decoder(config.text, dtype=dtype)
        if config.vision is not None:
            self.vision = family_of(config).tower(config.vision, dtype=dtype)
        self.config = config
        self.dtype = dtype
        self.remat = remat
        self.constrain = constrain
        self.attend = attend

    def encode_images(self, vision: VisionBatch) -> Float[Array, "rows tokens embed"]:
        """Merged image tokens in slot order, `slots // merge_unit` a row; meaningless where slots are padding."""
        return self.vision(vision, self.attend, self._checkpointed)

    def embed(
        self,
        tokens: Int[Array, "rows time"],
        image_slots: Int[Array, "rows time"] | None = None,
        image_features: Float[Array, "vision_rows tokens embed"] | None = None,
    ) -> Float[Array, "rows time embed"]:
        """Embeddings of tokens; where `image_slots` is not negative, that row of the flattened features instead."""
        # Gathered before the cast: the table is large, the gathered rows are few.
        x = jnp.take(self.language.embed.embedding[...], tokens, axis=0, mode="clip").astype(self.dtype)
        if image_features is not None:
            features = image_features.reshape(-1, image_features.shape[-1])
            placed = jnp.take(features, jnp.maximum(image_slots, 0), axis=0, mode="clip")
            x = jnp.where(image_slots[..., None] >= 0, placed.astype(self.dtype), x)
        return self.constrain(x, ACTIVATION_AXES)

    def hidden(
        self,
        x: Float[Array, "rows time embed"],
        positions: Int[Array, "3 rows time"],
        mask: KeyIntervals,
    ) -> Float[Array, "rows time embed"]:
        """Hidden states after the final norm, from embeddings; `mask` says which tokens of a row see which."""
        return self._run(x, positions, mask, keep_cache=False)[0]

    def prefill(
        self,
        x: Float[Array, "rows time embed"],
        positions: Int[Array, "3 rows time"],
        mask: KeyIntervals,
    ) -> tuple[
        Float[Array, "rows time embed"],
        Float[Array, "layers rows time kv_heads width"],
        Float[Array, "layers rows time kv_heads width"],
    ]:
        """The same, with every layer's keys (rotated) and values."""
        hidden, (keys, values) = self._run(x, positions, mask, keep_cache=True)
        return hidden, keys, values

    def head_embedding(self) -> Float[Array, "vocabulary embed"]:
        """The head's rows, float32: logits are `hidden @ rows.T`."""
        table = self.language.embed if self.config.text.tie_word_embeddings else self.language.head
        return table.embedding[...]

    def _run(self, x, positions, mask: KeyIntervals, *, keep_cache: bool):
        rope = rope_angles(positions, self.config.text)
        graphdef, stacked = nnx.split(self.language.layers)

        def body(x: Array, state: nnx.State):
            layer: DecoderLayer = nnx.merge(graphdef, state)
            q, k, v = layer.project(x, rope)
            attended, _ = self.attend(q, k, v, mask)
            x = self.constrain(layer.finish(x, attended), ACTIVATION_AXES)
            return x, ((k, v) if keep_cache else None)

        x, cache = jax.lax.scan(self._checkpointed(body), x, stacked)
        return self.language.norm(x), cache

    def _checkpointed(self, body: Callable) -> Callable:
        """A layer's body under the remat policy; inside a scan there is no common subexpression to fear."""
        if self.remat == "none":
            return body
        policy = jax.checkpoint_policies.save_only_these_names(*SAVED) if self.remat == "attention" else None
        return jax.checkpoint(body, prevent_cse=False, policy=policy)


@dataclasses.dataclass(frozen=True)
class Network:
    """A model without its parameters.

    Attributes:
      config: what the checkpoint says.
      compute_dtype: of matrix products.
      graphdef: the modules' structure.
      abstract_params: nested dict of `jax.ShapeDtypeStruct`, the shape of what `bind` takes.
      attention: name of the attention backend.
    """

    config: Architecture
    compute_dtype: Any
    graphdef: Any
    abstract_params: Params
    attention: str

    def init(self, key: Array) -> Params:
        """Random float32 parameters: normal with scale 0.02, norms 1, biases 0, as transformers initialises them."""
        leaves, tree = jax.tree_util.tree_flatten_with_path(self.abstract_params)
        keys = jax.random.split(key, len(leaves))
        return jax.tree.unflatten(
            tree, [_init_leaf(path[-1].key, leaf, k) for (path, leaf), k in zip(leaves, keys, strict=True)]
        )

    def bind(self, params: Mapping[str, Any]) -> Transformer:
        """The modules with these parameters (or tracers of them) in place."""
        return bind(self.graphdef, params)


def build(
    config: Architecture,
    compute_dtype: Any = jnp.float32,
    remat: Remat = "none",
    constrain: Constrain = unconstrained,
    attention: str = "xla",
) -> Network:
    """The network of a config.

    Args:
      config: from `read_architecture`.
      compute_dtype: of matrix products and activations; parameters stay float32.
      remat: what the backward pass computes again: "none" nothing but attention's scores, "attention" all but the
        large products (norms, activations, scores), "full" whole layers.
      constrain: called with activations and their logical axes; returns them with a sharding constraint.
      attention: name of the backend, from `attention.backends.resolve`.
    """
    dtype, attend = jnp.dtype(compute_dtype), BACKENDS[attention]
    abstract = nnx.eval_shape(
        lambda: Transformer(config, dtype=dtype, remat=remat, constrain=constrain, attend=attend)
    )
    graphdef, state = nnx.split(abstract)
    return Network(config, dtype, graphdef, nnx.to_pure_dict(state), attention)


def _init_leaf(name: str, leaf: jax.ShapeDtypeStruct, key: Array) -> Array:
    if name == "scale":
        return jnp.ones(leaf.shape, leaf.dtype)
    if name == "bias":
        return jnp.zeros(leaf.shape, leaf.dtype)
    return INIT_SCALE * jax.random.normal(key, leaf.shape, leaf.dtype)
