"""Images into vision rows of fixed length, in NumPy: all of an image's geometry becomes data.

Slots stand window by window (Qwen2.5-VL) and every window is padded to its full number of patches, so that window
attention is a batched product of fixed shape. Inside a window stand merge units of (usually) four patches, row by
row, each at its own place in the window:

    an image of 3 x 5 merged tokens, windows of 4 x 4:   window 0   a b c d      window 1   e . . .
                                                                     f g h i                 j . . .
                                                                     k l m n                 o . . .
                                                                     . . . .                 . . . .

Without windows (Qwen2-VL) an image's units simply follow each other. A video is an image of several frames; the
patches of a frame attend to each other and to no others, as in transformers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from lmmr1_jax.types.batches import VisionBatch
from weights_bridge.architecture import VisionConfig

Grid = tuple[int, int, int]


def slots_needed(grid_thw: Grid, config: VisionConfig) -> int:
    """Slots that an image takes in a vision row, padding of its border windows included."""
    t, h, w = (int(n) for n in grid_thw)
    if not config.window_tokens:
        return t * h * w
    side = config.window_tokens * config.spatial_merge_size
    return t * -(-h // side) * -(-w // side) * config.window_slots


def unit_places(grid_thw: Grid, config: VisionConfig) -> Int[np.ndarray, " units"]:
    """For each merged token of an image, in Hugging Face's order, the merge unit among the image's slots."""
    t, h, w = (int(n) for n in grid_thw)
    rows, columns = h // config.spatial_merge_size, w // config.spatial_merge_size
    side = config.window_tokens
    if not side:
        return np.arange(t * rows * columns)
    windows_down, windows_across = -(-rows // side), -(-columns // side)
    frame, row, column = np.meshgrid(np.arange(t), np.arange(rows), np.arange(columns), indexing="ij")
    window = (frame * windows_down + row // side) * windows_across + column // side
    return (window * side**2 + row % side * side + column % side).reshape(-1)


def patch_coordinates(grid_thw: Grid, config: VisionConfig) -> Int[np.ndarray, "patches 2"]:
    """Row and column of each patch in its frame, in Hugging Face's order (merge unit by merge unit)."""
    t, h, w = (int(n) for n in grid_thw)
    m = config.spatial_merge_size
    row, column = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")
    frame = np.stack([row, column], -1).reshape(h // m, m, w // m, m, 2).swapaxes(1, 2).reshape(h * w, 2)
    return np.tile(frame, (t, 1))


def pack_images(
    images: Sequence[tuple[Float[np.ndarray, "patches values"], Grid]],
    config: VisionConfig,
    *,
    slots: int,
    rows: int | None = None,
) -> tuple[VisionBatch, list[Int[np.ndarray, " tokens"]]]:
    """Place whole images into rows of `slots` slots, each into the first row with room, in the order given.

    Args:
      images: patches in Hugging Face's order, float32, with their grid.
      config: of the vision tower.
      slots: a row's length, a multiple of `config.window_slots`.
      rows: the number of rows; None makes as many as needed (at least one).

    Returns:
      The batch `[rows, slots, ...]`, and for each image the indices of its merged tokens, in the order of its
      image tokens, into the `[rows * slots // merge_unit]` merged tokens of the batch.

    Raises:
      ValueError: an image does not fit a row, or the images do not fit the rows.
    """
    if slots % config.window_slots:
        raise ValueError(f"{slots} slots a row is no multiple of {config.window_slots}")
    filled: list[int] = []
    places: list[tuple[int, int]] = []
    for _, grid in images:
        need = slots_needed(grid, config)
        if need > slots:
            raise ValueError(f"an image of {tuple(grid)} patches needs {need} slots, a row has {slots}")
        row = next((r for r, used in enumerate(filled) if used + need <= slots), len(filled))
        if row == len(filled):
            filled.append(0)
        places.append((row, filled[row]))
        filled[row] += need
    if rows is None:
        rows = max(len(filled), 1)
    elif len(filled) > rows:
        raise ValueError(f"the images need {len(filled)} vision rows of {slots} slots, there are {rows}")

    unit = config.merge_unit
    patches = np.zeros((rows, slots, config.patch_values), np.float32)
    coordinates = np.zeros((rows, slots, 2), np.int32)
    low, high = (np.zeros((rows, slots), np.int32) for _ in range(2))
    token_slots = []
    for (row, start), (values, grid) in zip(places, images, strict=True):
        t, h, w = (int(n) for n in grid)
        if values.shape != (t * h * w, config.patch_values):
            raise ValueError(f"an image of {(t, h, w)} patches has patches of shape {values.shape}")
        units = unit_places(grid, config)
        at = (start + units[:, None] * unit + np.arange(unit)).reshape(-1)
        patches[row, at] = values
        coordinates[row, at] = patch_coordinates(grid, config)
        of_frame = slots_needed((1, h, w), config)
        low[row, at] = start + of_frame * np.repeat(np.arange(t), h * w)
        high[row, at] = low[row, at] + of_frame
        token_slots.append(((row * slots + start) // unit + units).astype(np.int32))
    return VisionBatch(patches, coordinates, low, high), token_slots
