"""Sums over whole completions inside a micro-batch, of static shape."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def completion_sums(
    values: Float[Array, "rows slots"], completion: Int[Array, "rows slots"]
) -> Float[Array, "rows slots"]:
    """In every slot the sum of `values` over the slots of its completion; 0 at padding, whose values are not read.

    A completion lies whole in one row and its slots stand side by side (`packing.pack`), so a row is summed on its
    own, wherever the devices' borders are:

        completion  0  0  0  4  4 -1        values  1  2  3  4  5  ?        sums  6  6  6  9  9  0

    Args:
      values: one number per response slot.
      completion: the completion that each slot belongs to, -1 for padding.
    """

    def row(values, completion):
        begins = jnp.concatenate([jnp.zeros(1, jnp.int32), (completion[1:] != completion[:-1]).astype(jnp.int32)])
        place = jnp.cumsum(begins)  # 0, 1, 2, ... along the row: far fewer than the completions of the minibatch
        sums = jax.ops.segment_sum(values, place, num_segments=values.size, indices_are_sorted=True)
        return sums[place]

    held = completion >= 0
    return jnp.where(held, jax.vmap(row)(jnp.where(held, values, 0.0), completion), 0.0)
