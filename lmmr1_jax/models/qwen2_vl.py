"""What is Qwen2-VL's own: layer norms and a plain MLP in the vision tower, and videos whose frames are counted."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from lmmr1_jax.models.layers import LayerNorm, Linear, activation
from lmmr1_jax.models.mrope import grid_positions
from lmmr1_jax.models.vision import VisionBlock, VisionTower
from weights_bridge.architecture import Architecture


class Qwen2VLBlock(VisionBlock):
    """Layer norms and an MLP of two layers."""

    norm = LayerNorm

    def add_mlp(self, width: int, wide: int, **linear: Any) -> None:
        self.fc1, self.fc2 = Linear(width, wide, **linear), Linear(wide, width, **linear)

    def mlp(self, x: Float[Array, "rows slots width"]) -> Float[Array, "rows slots width"]:
        return self.fc2(activation(self.config.hidden_act, checkpoint_name(self.fc1(x), "gate")))


tower = functools.partial(VisionTower, block=Qwen2VLBlock)


def positions(
    token_ids: Int[np.ndarray, " time"],
    grids: Sequence[tuple[int, int, int]],
    config: Architecture,
    second_per_grid_ts: Sequence[float] | None = None,
) -> tuple[Int[np.ndarray, "3 time"], int]:
    """As `positions.prompt_positions`: one temporal position for each temporal patch of a video."""
    return grid_positions(token_ids, grids, config, lambda video: 1.0)
