"""Who sees whom: one interval of queries per key.

Packed rows hold segments one after the other, and completions follow their prompt, so the queries that see a key
always stand together: key j is seen by queries i with `low[j] <= i < high[j]`.

    a causal segment              low[j] = j                 high[j] = the segment's end
    a prompt with completions     low[j] = j                 high[j] = the end of the last completion
    a frame of an image           low[j] = the frame's start high[j] = the frame's end
    padding                       low[j] = high[j] = 0

Two numbers per key stand for segments, prefixes and causality together. They are made once per batch, not per layer.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyIntervals:
    """The queries that see each key.

    Attributes:
      low, high: int32 `[batch, keys]`; key j is seen by queries `low[j] <= i < high[j]`, by none where low is not
        below high.
      causal: static; promises `low[j] >= j`, so that a block of queries may skip the keys behind it. Queries and keys
        are then the same tokens.
    """

    low: Int[Array, "batch keys"]
    high: Int[Array, "batch keys"]
    causal: bool = dataclasses.field(default=True, metadata=dict(static=True))


def causal_intervals(lengths: Int[Array, " batch"], keys: int) -> KeyIntervals:
    """Rows that hold one sequence each, padded on the right to `keys` tokens."""
    index = jnp.broadcast_to(jnp.arange(keys, dtype=jnp.int32), (lengths.shape[0], keys))
    end = lengths.astype(jnp.int32)[:, None]
    return KeyIntervals(index, jnp.where(index < end, end, 0))


def window_intervals(whole: KeyIntervals, window: int) -> KeyIntervals:
    """Rows cut into windows of `window` keys, `[batch * windows, window]`: each key that is no padding is seen by its
    whole window."""
    low, high = (bound.reshape(-1, window) for bound in (whole.low, whole.high))
    return KeyIntervals(jnp.zeros_like(low), jnp.where(low < high, jnp.int32(window), 0), causal=False)
