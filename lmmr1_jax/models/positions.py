"""Positions of a prompt's tokens for the rotary embedding, as the model's family counts them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from lmmr1_jax.models.families import family_of
from weights_bridge.architecture import Architecture


def prompt_positions(
    token_ids: Int[np.ndarray, " time"],
    grids: Sequence[tuple[int, int, int]],
    config: Architecture,
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
    return family_of(config).positions(token_ids, grids, config, second_per_grid_ts)
