"""What an update changes: one pytree, donated from update to update."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import optax
from jaxtyping import Array, Int


@dataclasses.dataclass(frozen=True)
class CriticState:
    """The critic's part of the learner's state.

    Attributes:
      params: `score/kernel [D, 1]` and, with a backbone of its own, "language" and "vision" as the policy has them, but
        no head of logits. Float32.
      opt_state: Adam's moments of the trainable part.
    """

    params: dict[str, Any]
    opt_state: optax.ScaleByAdamState


@dataclasses.dataclass(frozen=True)
class TrainState:
    """The learner's state.

    Attributes:
      params: the nested dict of float32 master weights, layers stacked on axis 0.
      opt_state: Adam's moments of the trainable part and the number of updates that they have seen.
      step: int32, updates so far, the skipped ones included; the learning rate follows it.
      skipped_updates: int32, updates that were skipped because a gradient was not finite.
      critic: the critic's; None where the algorithm has none.
    """

    params: dict[str, Any]
    opt_state: optax.ScaleByAdamState
    step: Int[Array, ""]
    skipped_updates: Int[Array, ""]
    critic: CriticState | None = None


for _class in (CriticState, TrainState):
    jax.tree_util.register_dataclass(_class, data_fields=[f.name for f in dataclasses.fields(_class)], meta_fields=[])


def as_dict(state: TrainState) -> dict[str, Any]:
    """The state as a nested dict with string keys: its form on disk, which no library's classes are part of. It has a
    "critic" only where there is one."""
    tree = {
        "params": state.params,
        "opt_state": _moments_as_dict(state.opt_state),
        "step": state.step,
        "skipped_updates": state.skipped_updates,
    }
    if state.critic is not None:
        tree["critic"] = {"params": state.critic.params, "opt_state": _moments_as_dict(state.critic.opt_state)}
    return tree


def from_dict(tree: dict[str, Any]) -> TrainState:
    """The inverse of `as_dict`."""
    critic = None
    if "critic" in tree:
        critic = CriticState(tree["critic"]["params"], optax.ScaleByAdamState(**tree["critic"]["opt_state"]))
    return TrainState(
        params=tree["params"],
        opt_state=optax.ScaleByAdamState(**tree["opt_state"]),
        step=tree["step"],
        skipped_updates=tree["skipped_updates"],
        critic=critic,
    )


def _moments_as_dict(moments: optax.ScaleByAdamState) -> dict[str, Any]:
    return {"count": moments.count, "mu": moments.mu, "nu": moments.nu}
