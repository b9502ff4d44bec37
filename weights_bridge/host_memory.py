"""Copies between host arrays that the size of a model calls for care in."""

from __future__ import annotations

import math

import numpy as np

_ROWS = 64  # a block that stays in cache: a transposed copy in one go is two to five times slower
_ALIGNMENT = 64  # what XLA wants; a CPU device then takes the array as it is, without a second copy


def copy_blocks(target: np.ndarray, source: np.ndarray) -> None:
    """`target[...] = source`, cast to the target's dtype, in blocks along the axis that the source stores outermost."""
    axis = int(np.argmax(np.abs(source.strides)))
    to, origin = np.moveaxis(target, axis, 0), np.moveaxis(source, axis, 0)
    rows = _ROWS if source.ndim > 1 else 1 << 20
    for start in range(0, len(origin), rows):
        to[start : start + rows] = origin[start : start + rows].astype(target.dtype, copy=False)


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised array whose memory a CPU device can take over."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
