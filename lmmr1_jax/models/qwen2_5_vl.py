"""What is Qwen2.5-VL's own: RMS norms and a gated MLP in the vision tower, and videos whose seconds are counted."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from lmmr1_jax.models.layers import Linear, RMSNorm, activation
from lmmr1_jax.models.mrope import grid_positions
from lmmr1_jax.models.vision import VisionBlock, VisionTower
from weights_bridge.architecture import Architecture


class Qwen2_5VLBlock(VisionBlock):
    """RMS norms and a gated MLP."""

    norm = RMSNorm

    def add_mlp(self, width: int, wide: int, **linear: Any) -> None:
        self.gate, self.up = Linear(width, wide, **linear), Linear(width, wide, **linear)
        self.down = Linear(wide, width, **linear)

    def mlp(self, x: Float[Array, "rows slots width"]) -> Float[Array, "rows slots width"]:
        gate, up = checkpoint_name(self.gate(x), "gate"), checkpoint_name(self.up(x), "up")
        return self.down(activation(self.config.hidden_act, gate) * up)


tower = functools.partial(VisionTower, block=Qwen2_5VLBlock)


def positions(
    token_ids: Int[np.ndarray, " time"],
    grids: Sequence[tuple[int, int, int]],
    config: Architecture,
    second_per_grid_ts: Sequence[float] | None = None,
) -> tuple[Int[np.ndarray, "3 time"], int]:
    """As `positions.prompt_positions`: `tokens_per_second` temporal positions for each second of a video."""

    def interval(video: int) -> float:
        seconds = 1.0 if second_per_grid_ts is None else float(second_per_grid_ts[video])
        return config.vision.tokens_per_second * seconds

    return grid_positions(token_ids, grids, config, interval)
