"""What an update changes: one pytree, donated from update to update."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import optax
from jaxtyping import Array, Int

from lmmr1_jax.models.network import Params

POLICY = "policy"
"""The trainable that is sampled from and exported; every learner has it."""
RESERVED = ("params", "opt_state", "step", "skipped_updates")
"""Names on disk that no other trainable can have."""


@dataclasses.dataclass(frozen=True)
class TrainableState:
    """One trainable's part of the learner's state.

    Attributes:
      params: nested dict of float32 master weights, layers stacked on axis 0; the frozen ones too.
      opt_state: the optimizer's state of the trainable part.
    """

    params: Params
    opt_state: optax.OptState


@dataclasses.dataclass(frozen=True)
class TrainState:
    """The learner's state.

    Attributes:
      trained: by the trainable's name.
      step: int32, updates so far, the skipped ones included; learning rates follow it.
      skipped_updates: int32, updates that were skipped because a gradient or a loss was not finite.
    """

    trained: dict[str, TrainableState]
    step: Int[Array, ""]
    skipped_updates: Int[Array, ""]

    @property
    def params(self) -> Params:
        """The policy's parameters."""
        return self.trained[POLICY].params


for _class in (TrainableState, TrainState):
    jax.tree_util.register_dataclass(_class, data_fields=[f.name for f in dataclasses.fields(_class)], meta_fields=[])


def as_dict(state: TrainState) -> dict[str, Any]:
    """The state as a nested dict with string keys: its form on disk, which no library's classes are part of.

    "params" and "opt_state" are the policy's; every other trainable has its own under its name. An optimizer's state is
    a nested dict by the names and indices that lead to its arrays, without those of which none has any.
    """
    tree = {"step": state.step, "skipped_updates": state.skipped_updates}
    for name, part in state.trained.items():
        own = {"params": part.params}
        if opt_state := _nested(part.opt_state):
            own["opt_state"] = opt_state
        tree |= own if name == POLICY else {name: own}
    return tree


def from_dict(tree: Mapping[str, Any], like: TrainState) -> TrainState:
    """The inverse of `as_dict`; `like` is a state of the same structure, whose leaves may be anything."""
    trained = {}
    for name, part in like.trained.items():
        own = tree if name == POLICY else tree[name]
        trained[name] = TrainableState(own["params"], _from_nested(own.get("opt_state", {}), part.opt_state))
    return TrainState(trained, tree["step"], tree["skipped_updates"])


def _nested(opt_state: optax.OptState) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state):
        *parents, last = _names(path)
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree


def _from_nested(tree: Mapping[str, Any], like: optax.OptState) -> optax.OptState:
    def pick(path, _):
        node = tree
        for name in _names(path):
            node = node[name]
        return node

    return jax.tree_util.tree_map_with_path(pick, like)


def _names(path: tuple[Any, ...]) -> list[str]:
    return [jax.tree_util.keystr((key,), simple=True) for key in path]
