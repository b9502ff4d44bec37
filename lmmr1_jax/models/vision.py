"""The vision tower of Qwen2-VL and Qwen2.5-VL over rows of fixed length (see vision_batch.py); each family's file
has its block.

Window attention is attention over `[rows * windows, window_slots]`, a batched product of fixed shape; layers that
look at the whole frame attend by segment within a row. Layers are stacked and scanned by the smallest period of
their pattern: Qwen2.5-VL's 32 layers are 4 times (7 with windows, 1 without).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from lmmr1_jax.models.attention.backends import Attend
from lmmr1_jax.models.attention.mask import KeyIntervals, window_intervals
from lmmr1_jax.models.layers import (
    Linear,
    Stack,
    activation,
    inverse_frequencies,
    parameter,
    product,
    rotate,
)
from lmmr1_jax.types.batches import VisionBatch
from weights_bridge.architecture import VisionConfig

NORM_EPS = 1e-6
ROPE_THETA = 10_000.0


class FusedProjection(nnx.Module):
    """Queries, keys and values in one product; the three stand on an axis of their own so that heads can be split."""

    def __init__(self, width: int, *, dtype: jnp.dtype, stack: Stack = ()):
        self.kernel = parameter(*stack, width, 3, width)
        self.bias = parameter(*stack, 3, width)
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch 3 width"]:
        kernel = self.kernel[...].astype(self.dtype)
        flat = product(x, kernel.reshape(kernel.shape[0], -1))
        return flat.reshape(*x.shape[:-1], *kernel.shape[1:]) + self.bias[...].astype(self.dtype)


class VisionBlock(nnx.Module):
    """Attention and MLP, each behind a norm and added to the stream. A family's block adds the norm and the MLP.

    Attributes:
      norm: the class of the norms; the tower's last one is of it too.
    """

    norm: type[nnx.Module]

    def __init__(self, config: VisionConfig, *, dtype: jnp.dtype, stack: Stack = ()):
        width = config.hidden_size
        self.norm1, self.norm2 = self.norm(width, NORM_EPS, stack=stack), self.norm(width, NORM_EPS, stack=stack)
        self.qkv = FusedProjection(width, dtype=dtype, stack=stack)
        self.proj = Linear(width, width, bias=True, dtype=dtype, stack=stack)
        self.add_mlp(width, config.intermediate_size, bias=True, dtype=dtype, stack=stack)
        self.config = config

    def __call__(
        self,
        x: Float[Array, "rows slots width"],
        rope: tuple[Float[Array, "rows slots half"], Float[Array, "rows slots half"]],
        mask: KeyIntervals,
        attend: Attend,
    ) -> Float[Array, "rows slots width"]:
        """`mask` has the slots that attend to each other in a row of its own: a window's, or the whole row's."""
        heads, head_dim = self.config.num_heads, self.config.hidden_size // self.config.num_heads
        qkv = self.qkv(self.norm1(x)).reshape(*x.shape[:-1], 3, heads, head_dim)
        q = checkpoint_name(rotate(qkv[..., 0, :, :], *rope), "query")
        k = checkpoint_name(rotate(qkv[..., 1, :, :], *rope), "key")
        v = checkpoint_name(qkv[..., 2, :, :], "value")
        attended, _ = attend(*(a.reshape(*mask.low.shape, heads, head_dim) for a in (q, k, v)), mask)
        x = checkpoint_name(x + self.proj(attended.reshape(x.shape)), "middle")
        return x + self.mlp(self.norm2(x))

    def add_mlp(self, width: int, wide: int, **linear: Any) -> None:
        """Makes the family's layers from `width` to `wide` and back; `linear` is for every `Linear`."""
        raise NotImplementedError

    def mlp(self, x: Float[Array, "rows slots width"]) -> Float[Array, "rows slots width"]:
        """The family's MLP; its wide products are named "gate" and "up" for `remat`."""
        raise NotImplementedError


class Merger(nnx.Module):
    """Four neighbouring patches become one token of the decoder's width."""

    def __init__(self, config: VisionConfig, norm: type[nnx.Module], *, dtype: jnp.dtype):
        wide = config.hidden_size * config.merge_unit
        self.norm = norm(config.hidden_size, NORM_EPS)
        self.fc1 = Linear(wide, wide, bias=True, dtype=dtype)
        self.fc2 = Linear(wide, config.out_hidden_size, bias=True, dtype=dtype)
        self.merge_unit = config.merge_unit

    def __call__(self, x: Float[Array, "rows slots width"]) -> Float[Array, "rows tokens embed"]:
        rows, slots, width = x.shape
        units = self.norm(x).reshape(rows, slots // self.merge_unit, width * self.merge_unit)
        return self.fc2(activation("gelu", self.fc1(units)))


class VisionTower(nnx.Module):
    """Patches to merged tokens; `block` is the family's."""

    def __init__(self, config: VisionConfig, *, dtype: jnp.dtype, block: type[VisionBlock]):
        self.patch = Linear(config.patch_values, config.hidden_size, bias=False, dtype=dtype)
        self.blocks = block(config, dtype=dtype, stack=(config.depth,))
        self.merger = Merger(config, block.norm, dtype=dtype)
        self.config = config
        self.dtype = dtype

    def __call__(
        self, batch: VisionBatch, attend: Attend, wrap: Callable[[Callable], Callable] = lambda body: body
    ) -> Float[Array, "rows tokens embed"]:
        """Merged tokens in slot order; meaningless where slots are padding. `wrap` is applied to each layer's body."""
        head_dim = self.config.hidden_size // self.config.num_heads
        angles = vision_angles(batch.coordinates, head_dim)
        rope = jnp.cos(angles), jnp.sin(angles)
        graphdef, stacked = nnx.split(self.blocks)
        full_blocks, windowed = self.config.full_attention_blocks, self.config.window_tokens
        full = [i in full_blocks or not windowed for i in range(self.config.depth)]
        frames = KeyIntervals(batch.low, batch.high, causal=False)
        masks = {kind: frames if kind else window_intervals(frames, self.config.window_slots) for kind in set(full)}

        def layer(mask: KeyIntervals, x: Array, state: nnx.State) -> tuple[Array, None]:
            return nnx.merge(graphdef, state)(x, rope, mask, attend), None

        bodies = {kind: wrap(functools.partial(layer, mask)) for kind, mask in masks.items()}
        x = self.patch(batch.patches.astype(self.dtype))
        period = smallest_period(full)

        def group(x: Array, states: nnx.State) -> tuple[Array, None]:
            start = 0
            for kind, run in itertools.groupby(full[:period]):
                stop = start + len(list(run))
                x, _ = jax.lax.scan(bodies[kind], x, jax.tree.map(lambda leaf: leaf[start:stop], states))  # noqa: B023
                start = stop
            return x, None

        if len(set(full)) == 1:
            x, _ = jax.lax.scan(bodies[full[0]], x, stacked)
        else:
            groups = jax.tree.map(lambda leaf: leaf.reshape(-1, period, *leaf.shape[1:]), stacked)
            x, _ = jax.lax.scan(group, x, groups)
        return self.merger(x)


def vision_angles(coordinates: Int[Array, "rows slots 2"], head_dim: int) -> Float[Array, "rows slots half"]:
    """Rotary angles: the first half of the frequencies turns with the patch's row, the second with its column."""
    frequencies = inverse_frequencies(head_dim // 2, ROPE_THETA)
    angles = coordinates[..., None].astype(jnp.float32) * frequencies
    return angles.reshape(*coordinates.shape[:-1], -1)


def smallest_period(pattern: list[bool]) -> int:
    """Length of the shortest piece that, repeated, gives the pattern; its own length if none does."""
    length = len(pattern)
    return next(p for p in range(1, length + 1) if length % p == 0 and pattern[:p] * (length // p) == pattern)
