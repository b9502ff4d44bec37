"""Positions of a prompt's tokens for the rotary embedding, in NumPy: of text alone, and M-RoPE with images and videos.

Text counts on in all three rows (temporal, height, width). An image's merged tokens all begin at the position that
the text has reached, and spread from there over their grid; the text after it goes on behind the image's longer
side. The formula is transformers' `get_rope_index`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int

from weights_bridge.architecture import Architecture


def text_positions(
    token_ids: Int[np.ndarray, " time"],
    grids: Sequence[tuple[int, int, int]],
    config: Architecture,
    second_per_grid_ts: Sequence[float] | None = None,
) -> tuple[Int[np.ndarray, "3 time"], int]:
    """0, 1, 2, ... in all three rows. Arguments, returns and errors are those of `positions.prompt_positions`."""
    if len(grids):
        raise ValueError("a model without vision takes no images")
    return np.tile(np.arange(len(token_ids), dtype=np.int32), (3, 1)), len(token_ids)


def grid_positions(
    token_ids: Int[np.ndarray, " time"],
    grids: Sequence[tuple[int, int, int]],
    config: Architecture,
    interval_of: Callable[[int], float],
) -> tuple[Int[np.ndarray, "3 time"], int]:
    """Images and videos spread over their grids.

    Args:
      token_ids, grids, config: as `positions.prompt_positions` takes them.
      interval_of: number of a video -> temporal positions between two of its temporal patches.

    Returns:
      As `positions.prompt_positions`, and it raises the same.
    """
    token_ids = np.asarray(token_ids)
    merge = config.vision.spatial_merge_size
    is_vision = (token_ids == config.image_token_id) | (token_ids == config.video_token_id)
    positions = np.empty((3, len(token_ids)), np.int32)
    at, position, videos = 0, 0, 0
    for t, h, w in ((int(n) for n in grid) for grid in grids):
        following = np.flatnonzero(is_vision[at:])
        if len(following) == 0:
            raise ValueError(f"{len(grids)} grids, but fewer images among the tokens")
        text = int(following[0])
        positions[:, at : at + text] = position + np.arange(text)
        at, position = at + text, position + text

        token, rows, columns = token_ids[at], h // merge, w // merge
        count = t * rows * columns
        if len(token_ids) < at + count or (token_ids[at : at + count] != token).any():
            raise ValueError(f"the grid {(t, h, w)} needs {count} image tokens from token {at} on")
        interval = 1.0
        if token == config.video_token_id:
            interval = interval_of(videos)
            videos += 1
        frames = (np.arange(t, dtype=np.float32) * np.float32(interval)).astype(np.int32)
        spread = np.meshgrid(frames, np.arange(rows), np.arange(columns), indexing="ij")
        positions[:, at : at + count] = position + np.stack(spread).reshape(3, count)
        at, position = at + count, position + max(rows, columns)
    if is_vision[at:].any():
        raise ValueError(f"more image tokens than the {len(grids)} grids need")
    rest = len(token_ids) - at
    positions[:, at:] = position + np.arange(rest)
    return positions, position + rest
