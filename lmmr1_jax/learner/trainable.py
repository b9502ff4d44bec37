"""Parameters that are trained, and how they move.

Which of them move is a mask over the paths of the tree: a nested dict like the parameters' with a bool at every leaf.
A path is the keys from the root, joined by "/": `vision/blocks/fc1/kernel`.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Sequence
from typing import Any

import jax
import optax

from lmmr1_jax.models.network import Params

Mask = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Trainable:
    """A tree of parameters with its optimizer, without values.

    Attributes:
      params: nested dict of `jax.ShapeDtypeStruct`; those without a sharding lie whole on every device.
      optimizer: any optax transformation, its learning rate included. It sees the trainable part of the tree alone. Of
        the learner it gets the keyword `step` (see `optimizer.scale_by_schedule_of_step`), which transformations that
        know no such keyword are not given.
      mask: True where a parameter is trained, from `trainable_mask`; None trains all. The others keep their bits, have
        no gradients and no state in the optimizer.
      learning_rate: the schedule that the optimizer follows, for the metric of that name; None reports none.
      waits: updates in which parameters and the optimizer's state stay as they are, before `step` begins at 0.
      prefix: of the metrics' names: `<prefix>grad_norm`, `<prefix>learning_rate`.
    """

    params: Params
    optimizer: optax.GradientTransformation
    mask: Mask | None = None
    learning_rate: optax.Schedule | None = None
    waits: int = 0
    prefix: str = ""


def trainable_mask(params: Params, *, trained: Sequence[str] = ("*",), frozen: Sequence[str] = ()) -> Mask:
    """True at the parameters whose path matches a pattern of `trained` and none of `frozen`.

    Args:
      params: nested dict with anything at its leaves.
      trained, frozen: patterns as in a shell, whose "*" matches any number of keys: "vision/*", "*/lora_a/*".

    Raises:
      ValueError: a pattern matches no path, or nothing is left to train.
    """
    paths = {path: _joined(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    for pattern in (*trained, *frozen):
        if not any(fnmatch.fnmatchcase(path, pattern) for path in paths.values()):
            raise ValueError(f"the pattern {pattern!r} matches none of the parameters' paths")

    def is_trained(path, _) -> bool:
        def matches(patterns: Sequence[str]) -> bool:
            return any(fnmatch.fnmatchcase(paths[path], pattern) for pattern in patterns)

        return matches(trained) and not matches(frozen)

    mask = jax.tree_util.tree_map_with_path(is_trained, params)
    if not any(jax.tree.leaves(mask)):
        raise ValueError(f"nothing is left to train: trained {list(trained)}, frozen {list(frozen)}")
    return mask


def split(params: Params, mask: Mask | None) -> tuple[Params, Params]:
    """The trained and the frozen parameters, each a tree with only the branches that it has leaves in."""
    if mask is None:
        return params, {}
    trained, frozen = {}, {}
    for name, tree in params.items():
        if isinstance(tree, dict):
            parts = split(tree, mask[name])
        else:
            parts = (tree, {}) if mask[name] else ({}, tree)
        for part, whole in zip(parts, (trained, frozen), strict=True):
            if not isinstance(part, dict) or part:
                whole[name] = part
    return trained, frozen


def merge(trained: Params, frozen: Params) -> Params:
    """The inverse of `split`."""
    merged = dict(frozen)
    for name, tree in trained.items():
        merged[name] = merge(tree, frozen[name]) if name in frozen else tree
    return merged


def _joined(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
