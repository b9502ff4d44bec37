"""The decoder of Qwen2, Qwen2-VL and Qwen2.5-VL; they differ in their positions alone."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from lmmr1_jax.models.attention.xla import ATTENDED, NORMALIZER
from lmmr1_jax.models.layers import Embedding, Linear, RMSNorm, Stack, bind, inverse_frequencies, rotate
from weights_bridge.architecture import TextConfig

Rope = tuple[Float[Array, "*batch half"], Float[Array, "*batch half"]]

SAVED = ("query", "key", "value", ATTENDED, NORMALIZER, "middle", "gate", "up")
"""Names of what a layer's backward pass wants kept; norms, activations and scores are cheap to compute again."""


class DecoderLayer(nnx.Module):
    """A decoder layer, cut where attention stands: `project`, then attention of the caller's choice, then `finish`."""

    def __init__(self, config: TextConfig, *, dtype: jnp.dtype, stack: Stack = ()):
        width, queries = config.hidden_size, config.num_heads * config.head_dim
        keys = config.num_kv_heads * config.head_dim
        kwargs = dict(dtype=dtype, stack=stack)
        self.input_norm = RMSNorm(width, config.rms_norm_eps, stack=stack)
        self.query = Linear(width, queries, bias=True, **kwargs)
        self.key = Linear(width, keys, bias=True, **kwargs)
        self.value = Linear(width, keys, bias=True, **kwargs)
        self.output = Linear(queries, width, bias=False, **kwargs)
        self.mlp_norm = RMSNorm(width, config.rms_norm_eps, stack=stack)
        self.gate = Linear(width, config.intermediate_size, bias=False, **kwargs)
        self.up = Linear(width, config.intermediate_size, bias=False, **kwargs)
        self.down = Linear(config.intermediate_size, width, bias=False, **kwargs)
        self.head_dim = config.head_dim

    def project(
        self, x: Float[Array, "*batch embed"], rope: Rope
    ) -> tuple[
        Float[Array, "*batch heads width"], Float[Array, "*batch kv_heads width"], Float[Array, "*batch kv_heads width"]
    ]:
        """Queries and keys, rotated, and values; `rope` as `rope_angles` gives it for the same tokens."""
        normed = self.input_norm(x)
        split = (*x.shape[:-1], -1, self.head_dim)
        q = rotate(self.query(normed).reshape(split), *rope)
        k = rotate(self.key(normed).reshape(split), *rope)
        v = self.value(normed).reshape(split)
        return checkpoint_name(q, "query"), checkpoint_name(k, "key"), checkpoint_name(v, "value")

    def finish(
        self, x: Float[Array, "*batch embed"], attended: Float[Array, "*batch heads width"]
    ) -> Float[Array, "*batch embed"]:
        """The rest of the layer: output projection, residual, MLP, residual."""
        x = checkpoint_name(x + self.output(attended.reshape(*x.shape[:-1], -1)), "middle")
        normed = self.mlp_norm(x)
        gate, up = checkpoint_name(self.gate(normed), "gate"), checkpoint_name(self.up(normed), "up")
        return x + self.down(jax.nn.silu(gate) * up)


def bind_layer(params: Mapping[str, Any], config: TextConfig, dtype: jnp.dtype) -> DecoderLayer:
    """A single layer with these parameters (unstacked; or tracers of them) in place."""
    return bind(_layer_graphdef(config, jnp.dtype(dtype)), params)


@functools.cache
def _layer_graphdef(config: TextConfig, dtype: jnp.dtype) -> nnx.GraphDef:
    return nnx.split(nnx.eval_shape(lambda: DecoderLayer(config, dtype=dtype)))[0]


class Decoder(nnx.Module):
    """Embedding, stacked layers, final norm, and the head where it is not the embedding."""

    def __init__(self, config: TextConfig, *, dtype: jnp.dtype):
        self.embed = Embedding(config.vocab_size, config.hidden_size)
        self.layers = DecoderLayer(config, dtype=dtype, stack=(config.num_layers,))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.head = Embedding(config.vocab_size, config.hidden_size)


def rope_angles(positions: Int[Array, "3 *batch"], config: TextConfig) -> Rope:
    """cos and sin, float32 `[*batch, head_dim / 2]`, of every rotary frequency at its own kind of position.

    With multimodal positions the first `mrope_section[0]` frequencies turn with the temporal position, the next
    with the height, the last with the width; else all turn with the first row.
    """
    frequencies = inverse_frequencies(config.head_dim, config.rope_theta)
    if config.mrope_section is None:
        turned = positions[0][..., None].astype(jnp.float32)
    else:
        row = np.repeat(np.arange(3), config.mrope_section)
        turned = jnp.moveaxis(positions.astype(jnp.float32)[row], 0, -1)
    angles = turned * frequencies
    return jnp.cos(angles), jnp.sin(angles)
