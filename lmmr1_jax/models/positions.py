"""Positions of a prompt's tokens for the rotary embedding, in NumPy.

Text counts on in all three rows (temporal, height, width). An image's merged tokens all begin at the position that
the text has reached, and spread from there over their grid; the text after it goes on behind the image's longer
side. The formula is transformers' `get_rope_index`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from lmmr1_jax.models.config import ModelConfig


def prompt_positions(
    token_ids: Int[np.ndarray, " time"],
    grids: Sequence[tuple[int, int, int]],
    config: ModelConfig,
    *,
    second_per_grid_ts: Sequence[float] | None = None,
) -> tuple[Int[np.ndarray, "3 time"], int]:
    """Positions of a sequence and the position at which it goes on.

    Args:
      token_ids: the prompt with every image and video expanded to its number of tokens.
      grids: patches in time, height and width of each image and video, in order of appearance.
      config: of the model; without vision all three rows count 0, 1, 2, ...
      second_per_grid_ts: seconds between two temporal patches, one number per video (1 when None). Only
        Qwen2.5-VL reads it; Qwen2-VL counts temporal patches.

    Returns:
      int32 `[3, time]`, and the position of the next text token, equal in all rows.

    Raises:
      ValueError: the tokens and the grids do not fit together.
    """
    token_ids = np.asarray(token_ids)
    if config.vision is None:
        if len(grids):
            raise ValueError("a model without vision takes no images")
        return np.tile(np.arange(len(token_ids), dtype=np.int32), (3, 1)), len(token_ids)
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

        kind, rows, columns = token_ids[at], h // merge, w // merge
        count = t * rows * columns
        if len(token_ids) < at + count or (token_ids[at : at + count] != kind).any():
            raise ValueError(f"the grid {(t, h, w)} needs {count} image tokens from token {at} on")
        interval = 1.0
        if kind == config.video_token_id:
            if config.vision.kind == "qwen2_5_vl":
                seconds = 1.0 if second_per_grid_ts is None else float(second_per_grid_ts[videos])
                interval = config.vision.tokens_per_second * seconds
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
