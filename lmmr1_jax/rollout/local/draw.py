"""Drawing tokens from logits over a large vocabulary, by the inverse of the cumulative distribution.

A Gumbel maximum needs a random number and two logarithms for each of 151,936 ids and row. Here a row needs two uniform
numbers in all: the vocabulary is cut into blocks, the first number chooses a block in proportion to the block's mass,
the second an id within it. What is left to do for every id is one maximum, one exponential and one addition.
(With a single number for both choices, ids of probability below 2^-23 would be out of reach.)

Logits stand as `[vocabulary, batch]`: sums over the vocabulary are then sums of contiguous vectors, and the head's
product needs no transposed copy of the embedding. Temperature and banned ids are applied before they come here, the
first to the hidden states, the second as rows of -inf: both are cheaper there than a pass over all logits.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

ABOVE_ONE = 0x3F800001  # the bits of the float32 after 1.0, the largest weight


def block_size(vocabulary: int) -> int:
    """The largest divisor of `vocabulary` up to its square root; 128 for 151,936."""
    return next(size for size in range(math.isqrt(vocabulary), 0, -1) if vocabulary % size == 0)


def draw_tokens(
    logits: Float[Array, "vocabulary batch"],
    uniforms: Float[Array, "2 batch"],
    *,
    top_p: Float[Array, ""] | float | None = None,
    top_k: Int[Array, ""] | int | None = None,
) -> tuple[Int[Array, "batch"], Float[Array, "batch"]]:
    """Draws one id per row from softmax(logits).

    Args:
      logits: float32, natural logarithms up to a constant per row; -inf for an id that is never drawn.
      uniforms: float32 in [0, 1), independent of each other and between rows.
      top_p: draw from the smallest set of most probable ids with at least this mass; None for all ids.
      top_k: draw from this many most probable ids; None for all ids. Ids that tie with the last one stay in.

    Returns:
      int32 ids and their float32 log-probs: those of the whole distribution, whatever `top_p` and `top_k` are.
    """
    batch = logits.shape[1]
    blocks = logits.reshape(-1, block_size(logits.shape[0]), batch)
    highest = jnp.max(logits, 0)
    weights = jnp.exp(blocks - highest)
    kept = weights if top_p is None and top_k is None else _truncate(weights, top_p, top_k)
    # XLA would turn the sum of these sums into a second pass over the whole vocabulary.
    masses = jax.lax.optimization_barrier(jnp.sum(weights, 1))
    block = _choose(masses if kept is weights else jnp.sum(kept, 1), uniforms[0])
    rows = jnp.arange(batch)
    inside = blocks[block, :, rows]
    if kept is weights:
        inside_weights = jnp.exp(inside - highest[:, None])
    else:
        inside_weights = kept[block, :, rows]
    offset = _choose(inside_weights.T, uniforms[1])
    token = (block * blocks.shape[1] + offset).astype(jnp.int32)
    return token, inside[rows, offset] - highest - jnp.log(jnp.sum(masses, 0))


def most_probable_tokens(
    logits: Float[Array, "vocabulary batch"],
) -> tuple[Int[Array, "batch"], Float[Array, "batch"]]:
    """The most probable id of each row (the lowest of those that tie) and its log-prob."""
    batch = logits.shape[1]
    blocks = logits.reshape(-1, block_size(logits.shape[0]), batch)
    block_highest = jnp.max(blocks, 1)
    highest = jnp.max(block_highest, 0)
    log_total = jnp.log(jnp.sum(jnp.sum(jnp.exp(blocks - highest), 1), 0))
    block = _first(block_highest >= highest)
    offset = _first(blocks[block, :, jnp.arange(batch)].T >= highest)
    return (block * blocks.shape[1] + offset).astype(jnp.int32), -log_total


def _first(flags) -> Int[Array, "batch"]:
    """The lowest index per row whose flag is set. (A two-valued argmax is several times as slow on CPUs.)"""
    count = flags.shape[0]
    return jnp.min(jnp.where(flags, jnp.arange(count)[:, None], count - 1), 0)


def _choose(weights: Float[Array, "choices batch"], uniform: Float[Array, "batch"]) -> Int[Array, "batch"]:
    """An index per row, in proportion to its weight; never one of weight zero, however the sums are rounded."""
    cumulative = jnp.cumsum(weights, 0)
    positive = weights > 0
    index = jnp.arange(weights.shape[0])[:, None]
    # A parallel sum is not monotone to the last bit: rarely no index is reached, then the last possible one is it.
    last = jnp.max(jnp.where(positive, index, 0), 0)
    return jnp.minimum(_first(positive & (cumulative > uniform * cumulative[-1])), last)


def _truncate(weights: Float[Array, "blocks block batch"], top_p, top_k) -> Float[Array, "blocks block batch"]:
    """Weights (each row's largest is 1), zero outside the `top_k` largest and then outside the nucleus of `top_p`.

    The threshold is found by bisection over the bits of a float32, which order as the numbers do: 31 sums over the
    vocabulary instead of a sort.
    """
    keep = lambda threshold: jnp.where(weights >= threshold, weights, 0.0)  # noqa: E731
    if top_k is not None:
        weights = keep(_largest_threshold(lambda t: jnp.sum(weights >= t, (0, 1)) >= top_k, weights.shape[-1]))
    if top_p is not None:
        needed = top_p * jnp.sum(weights, (0, 1))
        weights = keep(_largest_threshold(lambda t: jnp.sum(keep(t), (0, 1)) >= needed, weights.shape[-1]))
    return weights


def _largest_threshold(enough, batch: int) -> Float[Array, "batch"]:
    """The largest float32 in [0, 1], per row, at which `enough` still holds (taken for granted at 0)."""

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) // 2
        holds = enough(jax.lax.bitcast_convert_type(middle, jnp.float32))
        return jnp.where(holds, middle, low), jnp.where(holds, high, middle)

    bounds = jnp.zeros(batch, jnp.int32), jnp.full(batch, ABOVE_ONE, jnp.int32)
    return jax.lax.bitcast_convert_type(jax.lax.fori_loop(0, 31, halve, bounds)[0], jnp.float32)
