"""Attention in plain XLA: runs everywhere, and the oracle of every kernel.

Scores exist for one block of queries at a time and never outlive it: the backward pass recomputes them from the
log-sum-exp, as in FlashAttention (https://arxiv.org/abs/2205.14135).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from lmmr1_jax.models.attention.mask import KeyIntervals

QUERY_BLOCK = 128
"""Queries whose scores exist at a time. Blocks are unrolled, so that a causal block skips the keys behind it."""
MAX_BLOCKS = 16
"""Longer rows get larger blocks: the program's size stays bounded."""
ATTENDED, NORMALIZER = "attended", "normalizer"
"""Names (`jax.ad_checkpoint.checkpoint_name`) of what the backward pass needs beside queries, keys and values."""
_MASKED = -1e30


def attend(
    q: Float[Array, "batch queries heads width"],
    k: Float[Array, "batch keys kv_heads width"],
    v: Float[Array, "batch keys kv_heads width"],
    mask: KeyIntervals,
) -> tuple[Float[Array, "batch queries heads width"], Float[Array, "batch heads queries"]]:
    """softmax(q k^T / sqrt(width)) v over the keys that each query sees, heads grouped over key-value heads.

    Args:
      q, k, v: in the compute dtype; products accumulate in float32, the softmax is float32.
      mask: who sees whom.

    Returns:
      The attended values in q's dtype, 0 where a query sees no key; and the float32 log-sum-exp of each query's
      scores, below -1e29 where it sees no key, by which attention over several sets of keys is merged. Both are
      differentiable in q, k and v.

    Raises:
      ValueError: the mask is causal and there are not as many keys as queries.
    """
    if mask.causal and q.shape[1] != k.shape[1]:
        raise ValueError(f"a causal mask needs as many keys as queries, not {k.shape[1]} and {q.shape[1]}")
    batch, queries, heads, width = q.shape
    kv_heads = k.shape[2]
    grouped = (q * width**-0.5).astype(q.dtype).reshape(batch, queries, kv_heads, heads // kv_heads, width)
    grouped = grouped.transpose(0, 2, 3, 1, 4)  # batch, kv_heads, group, queries, width
    out, normalizer = _attend(grouped, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), mask)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, queries, heads, width), normalizer.reshape(batch, heads, queries)


@jax.custom_vjp
def _attend(q: Array, k: Array, v: Array, mask: KeyIntervals) -> tuple[Array, Array]:
    return _forward(q, k, v, mask)[0]


def _forward(q: Array, k: Array, v: Array, mask: KeyIntervals):
    outs, normalizers = [], []
    for start, stop, keys in _blocks(mask.causal, q.shape[3], k.shape[2]):
        scores = _scores(q[:, :, :, start:stop], k[:, :, :keys], _bias(mask, start, stop, keys))
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
    return (out, normalizer), (q, k, v, mask, out, normalizer)


def _backward(residuals, cotangents):
    q, k, v, mask, out, normalizer = residuals
    d_out, d_normalizer = cotangents
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1, keepdims=True) - d_normalizer[..., None]
    d_q = []
    # Gradients of keys and values gather as [..., width, keys]: that way the small operand is the one transposed.
    d_k, d_v = (jnp.zeros(jnp.swapaxes(x, 2, 3).shape, jnp.float32) for x in (k, v))
    for start, stop, keys in _blocks(mask.causal, q.shape[3], k.shape[2]):
        q_block, k_block, v_block = q[:, :, :, start:stop], k[:, :, :keys], v[:, :, :keys]
        d_block = d_out[:, :, :, start:stop]
        scores = _scores(q_block, k_block, _bias(mask, start, stop, keys))
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


def _blocks(causal: bool, queries: int, keys: int) -> list[tuple[int, int, int]]:
    """(start, stop, keys to look at) of each block of queries."""
    size = max(QUERY_BLOCK, -(-queries // MAX_BLOCKS))
    starts = range(0, queries, size)
    stops = [min(start + size, queries) for start in starts]
    return [(start, stop, stop if causal else keys) for start, stop in zip(starts, stops, strict=True)]


def _bias(mask: KeyIntervals, start: int, stop: int, keys: int) -> Float[Array, "batch queries keys"]:
    """0 where queries `start` to `stop` see one of the first `keys` keys, else _MASKED."""
    query = jnp.arange(start, stop, dtype=jnp.int32)[:, None]
    seen = (mask.low[:, None, :keys] <= query) & (query < mask.high[:, None, :keys])
    # Added, and made once for all heads: XLA's CPU kernels fuse an addition into the product, a selection they don't.
    return jax.lax.optimization_barrier(jnp.where(seen, jnp.float32(0), jnp.float32(_MASKED)))


def _scores(q: Array, k: Array, bias: Float[Array, "batch queries keys"]) -> Array:
    return jnp.einsum("bkgqd,bksd->bkgqs", q, k, preferred_element_type=jnp.float32) + bias[:, None, None]
