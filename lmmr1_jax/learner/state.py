"""What an update changes: one pytree, donated from update to update."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import optax
from jaxtyping import Array, Int


@dataclasses.dataclass(frozen=True)
class TrainState:
    """The learner's state.

    Attributes:
      params: the nested dict of float32 master weights, layers stacked on axis 0.
      opt_state: Adam's moments of the trainable part and the number of updates that they have seen.
      step: int32, updates so far, the skipped ones included; the learning rate follows it.
      skipped_updates: int32, updates that were skipped because a gradient was not finite.
    """

    params: dict[str, Any]
    opt_state: optax.ScaleByAdamState
    step: Int[Array, ""]
    skipped_updates: Int[Array, ""]


jax.tree_util.register_dataclass(
    TrainState, data_fields=[f.name for f in dataclasses.fields(TrainState)], meta_fields=[]
)


def as_dict(state: TrainState) -> dict[str, Any]:
    """The state as a nested dict with string keys: its form on disk, which no library's classes are part of."""
    moments = {"count": state.opt_state.count, "mu": state.opt_state.mu, "nu": state.opt_state.nu}
    return {
        "params": state.params,
        "opt_state": moments,
        "step": state.step,
        "skipped_updates": state.skipped_updates,
    }


def from_dict(tree: dict[str, Any]) -> TrainState:
    """The inverse of `as_dict`."""
    return TrainState(
        params=tree["params"],
        opt_state=optax.ScaleByAdamState(**tree["opt_state"]),
        step=tree["step"],
        skipped_updates=tree["skipped_updates"],
    )
