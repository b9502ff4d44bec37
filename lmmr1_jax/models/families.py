"""From a checkpoint's `model_type` to what its family computes in ways of its own.

A new family is a file here (its blocks, its positions), a file in `weights_bridge/families` (its `config.json`, its
tensors), and a line in the registry of each. What all families share is chosen by the fields of `Architecture`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from lmmr1_jax.models import mrope, qwen2_5_vl, qwen2_vl
from lmmr1_jax.runtime.errors import UserError
from weights_bridge.architecture import Architecture


@dataclasses.dataclass(frozen=True)
class Family:
    """What differs between model families.

    Attributes:
      positions: arguments, returns and errors of `positions.prompt_positions`.
      tower: (VisionConfig, dtype=...) -> the vision tower's module, called as `vision.VisionTower` is; None for
        models of text.
      image_format: fields of `data.images.ImageFormat` that are others than its defaults, for folders whose
        preprocessor_config.json doesn't name them.
    """

    positions: Callable[..., Any]
    tower: Callable[..., nnx.Module] | None = None
    image_format: Mapping[str, Any] = dataclasses.field(default_factory=dict)


FAMILIES: dict[str, Family] = {
    "qwen2": Family(mrope.text_positions),
    "qwen2_vl": Family(qwen2_vl.positions, qwen2_vl.tower),
    "qwen2_5_vl": Family(qwen2_5_vl.positions, qwen2_5_vl.tower),
}
"""By `model_type`. Another package may add to it, and to `weights_bridge.families.registry` its tensors."""


def family_of(config: Architecture) -> Family:
    """The family of a model; a UserError lists the supported ones where there is none."""
    if config.model_type not in FAMILIES:
        raise UserError(f"model_type {config.model_type!r} has no modules here; supported: {', '.join(FAMILIES)}")
    return FAMILIES[config.model_type]
