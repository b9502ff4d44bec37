"""Attention: one function, one mask rule, the oracle for every kernel to come.

A query sees a key when the key is no padding (segment 0), stands at or before it (causal), and belongs either to
the query's own segment or to the segment of the query's prompt (its prefix). That one rule serves packed rows in
which a group's prompt stands once, plain sequences, cached decoding and, without causality, the vision tower.

Kernels for accelerators (splash on TPU, cuDNN on GPU) plug in behind `attend`, chosen once at start-up and logged;
what is here is plain XLA and runs everywhere. Scores exist for one block of queries at a time and never outlive it:
the backward pass recomputes them from the log-sum-exp, as in FlashAttention (https://arxiv.org/abs/2205.14135).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

QUERY_BLOCK = 128
"""Queries whose scores exist at a time. Blocks are unrolled, so that a causal block skips the keys behind it."""
MAX_BLOCKS = 16
"""Longer rows get larger blocks: the program's size stays bounded."""
ATTENDED, NORMALIZER = "attended", "normalizer"
"""Names (`jax.ad_checkpoint.checkpoint_name`) of what the backward pass needs beside queries, keys and values."""
_MASKED = -1e30


class Mask(NamedTuple):
    """What decides who sees whom: int32 `[batch, queries]` and `[batch, keys]`; index None means no causality."""

    query_segments: Array
    query_prefixes: Array
    key_segments: Array
    query_index: Array | None
    key_index: Array | None


def attend(
    q: Float[Array, "batch queries heads width"],
    k: Float[Array, "batch keys kv_heads width"],
    v: Float[Array, "batch keys kv_heads width"],
    *,
    query_segments: Int[Array, "batch queries"],
    key_segments: Int[Array, "batch keys"],
    query_prefixes: Int[Array, "batch queries"] | None = None,
    query_index: Int[Array, "batch queries"] | None = None,
    key_index: Int[Array, "batch keys"] | None = None,
    causal: bool = True,
) -> Float[Array, "batch queries heads width"]:
    """softmax(q k^T / sqrt(width)) v under the mask rule above, heads grouped over key-value heads.

    Args:
      q, k, v: in the compute dtype; products accumulate in float32, the softmax is float32.
      query_segments, key_segments: segments from 1 within a row, 0 is padding.
      query_prefixes: the segment of each query's prompt; None means its own segment.
      query_index, key_index: order within the row; None means that queries and keys are the same tokens in order,
        which lets a block of queries skip the keys behind it.
      causal: whether a query sees keys up to its own index only.

    Returns:
      In q's dtype; 0 where a query sees no key.
    """
    in_order = query_index is None and key_index is None
    if causal and in_order and q.shape[1] != k.shape[1]:
        raise ValueError("queries and keys of different lengths need query_index and key_index")
    if causal and in_order:
        query_index = key_index = jnp.broadcast_to(jnp.arange(q.shape[1], dtype=jnp.int32), q.shape[:2])
    elif not causal:
        query_index = key_index = None
    prefixes = query_segments if query_prefixes is None else query_prefixes
    mask = Mask(query_segments, prefixes, key_segments, query_index, key_index)

    batch, queries, heads, width = q.shape
    kv_heads = k.shape[2]
    grouped = (q * width**-0.5).astype(q.dtype).reshape(batch, queries, kv_heads, heads // kv_heads, width)
    grouped = grouped.transpose(0, 2, 3, 1, 4)  # batch, kv_heads, group, queries, width
    out = _attend(causal and in_order, grouped, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), mask)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, queries, heads, width)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(in_order: bool, q: Array, k: Array, v: Array, mask: Mask) -> Array:
    return _forward(in_order, q, k, v, mask)[0]


def _forward(in_order: bool, q: Array, k: Array, v: Array, mask: Mask):
    outs, normalizers = [], []
    for start, stop, keys in _blocks(in_order, q.shape[3], k.shape[2]):
        scores = _scores(q[:, :, :, start:stop], k[:, :, :keys], _cut(mask, start, stop, keys))
        # The floor keeps exp(masked - largest) at 0 where all of a query's keys are masked.
        largest = jnp.maximum(scores.max(-1, keepdims=True), _MASKED / 2)
        weights = jnp.exp(scores - largest)
        total = weights.sum(-1, keepdims=True)
        out = jnp.einsum(
            "bkgqs,bksd->bkgqd", weights.astype(v.dtype), v[:, :, :keys], preferred_element_type=jnp.float32
        )
        outs.append((out / jnp.maximum(total, 1e-30)).astype(q.dtype))
        normalizers.append((largest + jnp.log(jnp.maximum(total, 1e-30)))[..., 0])
    out = outs[0] if len(outs) == 1 else jnp.concatenate(outs, 3)
    normalizer = normalizers[0] if len(outs) == 1 else jnp.concatenate(normalizers, 3)
    # Named, so that a remat policy can keep them: without both the backward pass would run this function again.
    out, normalizer = checkpoint_name(out, ATTENDED), checkpoint_name(normalizer, NORMALIZER)
    return out, (q, k, v, mask, out, normalizer)


def _backward(in_order: bool, residuals, d_out: Array):
    q, k, v, mask, out, normalizer = residuals
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1, keepdims=True)
    d_q = []
    # Gradients of keys and values gather as [..., width, keys]: that way the small operand is the one transposed.
    d_k, d_v = (jnp.zeros(jnp.swapaxes(x, 2, 3).shape, jnp.float32) for x in (k, v))
    for start, stop, keys in _blocks(in_order, q.shape[3], k.shape[2]):
        q_block, k_block, v_block = q[:, :, :, start:stop], k[:, :, :keys], v[:, :, :keys]
        d_block = d_out[:, :, :, start:stop]
        scores = _scores(q_block, k_block, _cut(mask, start, stop, keys))
        # A query that sees no key has a normalizer near _MASKED / 2: exp(_MASKED - that) is 0 all the same.
        weights = jnp.exp(scores - normalizer[:, :, :, start:stop, None])
        d_weights = jnp.einsum("bkgqd,bksd->bkgqs", d_block, v_block, preferred_element_type=jnp.float32)
        d_scores = (weights * (d_weights - delta[:, :, :, start:stop])).astype(q.dtype)
        d_q.append(jnp.einsum("bkgqs,bksd->bkgqd", d_scores, k_block, preferred_element_type=jnp.float32))
        d_k = d_k.at[..., :keys].add(_over_queries(q_block, d_scores))
        d_v = d_v.at[..., :keys].add(_over_queries(d_block, weights.astype(v.dtype)))
    d_q = d_q[0] if len(d_q) == 1 else jnp.concatenate(d_q, 3)
    return d_q.astype(q.dtype), jnp.swapaxes(d_k, 2, 3).astype(k.dtype), jnp.swapaxes(d_v, 2, 3).astype(v.dtype), None


def _over_queries(per_query: Array, weights: Array) -> Array:
    """Sum over a key-value head's group and queries of [..., width] x [..., keys]: float32 [b, k, width, keys]."""
    batch, kv_heads, group, queries, width = per_query.shape
    flat = per_query.reshape(batch, kv_heads, group * queries, width)
    weights = weights.reshape(batch, kv_heads, group * queries, -1)
    return jnp.einsum("bkdq,bkqs->bkds", jnp.swapaxes(flat, 2, 3), weights, preferred_element_type=jnp.float32)


_attend.defvjp(_forward, _backward)


def _blocks(in_order: bool, queries: int, keys: int) -> list[tuple[int, int, int]]:
    """(start, stop, keys to look at) of each block of queries."""
    size = max(QUERY_BLOCK, -(-queries // MAX_BLOCKS))
    starts = range(0, queries, size)
    stops = [min(start + size, queries) for start in starts]
    return [(start, stop, stop if in_order else keys) for start, stop in zip(starts, stops, strict=True)]


def _cut(mask: Mask, start: int, stop: int, keys: int) -> Mask:
    index = None if mask.query_index is None else mask.query_index[:, start:stop]
    key_index = None if mask.key_index is None else mask.key_index[:, :keys]
    return Mask(
        mask.query_segments[:, start:stop], mask.query_prefixes[:, start:stop], mask.key_segments[:, :keys],
        index, key_index,
    )  # fmt: skip


def _scores(q: Array, k: Array, mask: Mask) -> Array:
    scores = jnp.einsum("bkgqd,bksd->bkgqs", q, k, preferred_element_type=jnp.float32)
    keys = mask.key_segments[:, None, :]
    seen = (keys > 0) & ((keys == mask.query_segments[:, :, None]) | (keys == mask.query_prefixes[:, :, None]))
    if mask.query_index is not None:
        seen &= mask.key_index[:, None, :] <= mask.query_index[:, :, None]
    # Added, and made once for all heads: XLA's CPU kernels fuse an addition into the product, a selection they don't.
    bias = jax.lax.optimization_barrier(jnp.where(seen, jnp.float32(0), jnp.float32(_MASKED)))
    return scores + bias[:, None, None]
