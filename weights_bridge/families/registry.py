"""From the `model_type` of a `config.json` to what the bridge knows of the model's family."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from weights_bridge.architecture import Architecture
from weights_bridge.entries import Entry
from weights_bridge.errors import CheckpointError
from weights_bridge.families import qwen2, qwen2_5_vl, qwen2_vl


@dataclasses.dataclass(frozen=True)
class Family:
    """What the bridge must know of a model family.

    Attributes:
      parse: the contents of `config.json` -> what they say. Raises CheckpointError where they can't be computed.
      entries: the same, and whether there is a head over the vocabulary -> the model's tensors in the table's order.
    """

    parse: Callable[[Mapping[str, Any]], Architecture]
    entries: Callable[[Architecture, bool], Iterable[Entry]]


FAMILIES: dict[str, Family] = {
    "qwen2": Family(qwen2.parse, qwen2.entries),
    "qwen2_vl": Family(qwen2_vl.parse, qwen2_vl.entries),
    "qwen2_5_vl": Family(qwen2_5_vl.parse, qwen2_5_vl.entries),
}
"""By `model_type`. Another package may add to it, and to `lmmr1_jax.models.families` its modules."""


def family_of(model_type: Any) -> Family:
    """The family of a model type; a CheckpointError lists the supported ones where there is none."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(f"model_type {model_type!r} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]
