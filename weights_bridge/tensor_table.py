"""The one table: every tensor of a Hugging Face checkpoint, its leaf in the Flax parameter tree, and the way between.

Loading, exporting and streaming to engines all read this table, so the three cannot disagree. The tree is a plain
nested dict; the layers of a stack share one leaf, stacked on axis 0:

    language/embed/embedding [V, D]            model.embed_tokens.weight
    language/layers/query/kernel [N, D, H*d]   model.layers.{n}.self_attn.q_proj.weight [H*d, D]
    vision/blocks/qkv/kernel [N, D, 3, D]      visual.blocks.{n}.attn.qkv.weight [3*D, D]
    ...

Names in the table are those of the checkpoints on the hub (`visual.*`, `model.*`, `lm_head.weight`);
`canonical_name` brings the newer spelling (`model.visual.*`, `model.language_model.*`) and that of a base model saved
by itself (`visual.*`, `language_model.*`) to them.

Each family's tensors stand in its file under `families/`. A reward model has the same table with `score.weight`
instead of the head over the vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from weights_bridge.architecture import Architecture
from weights_bridge.config_json import read_architecture
from weights_bridge.entries import Axes, Entry, LeafPath, Transform
from weights_bridge.errors import CheckpointError
from weights_bridge.families.registry import family_of

SCORE_NAME = "score.weight"

Head = Literal["tokens", "score"]
"""What the hidden states end in: logits over the vocabulary, or a reward model's one number."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf of the parameter tree: its whole shape, its logical axes, and the tensors that fill it in order."""

    path: LeafPath
    shape: tuple[int, ...]
    axes: Axes
    entries: tuple[Entry, ...]


def layout(model: Architecture, head: Head = "tokens") -> tuple[Entry, ...]:
    """The table for a model.

    Args:
      model: what its `config.json` says.
      head: "score" for a reward model, which has `score/kernel` [D, 1] and no head over the vocabulary.

    Raises:
      CheckpointError: for a model type that is not supported.
    """
    with_head = head == "tokens" and not model.text.tie_word_embeddings
    entries = list(family_of(model.model_type).entries(model, with_head))
    if head == "score":
        width = model.text.hidden_size
        transform = Transform((1, width), (1, 0))
        entries.append(Entry(SCORE_NAME, ("score", "kernel"), None, transform, (1, width), (width, 1), ("embed", None)))
    return tuple(entries)


def read_layout(folder: str | Path, head: Head = "tokens") -> tuple[Entry, ...]:
    """The table for the model in a Hugging Face folder.

    Raises:
      CheckpointError: as `read_architecture`; the message names the file.
    """
    return layout(read_architecture(folder), head)


def leaves(entries: Iterable[Entry]) -> dict[LeafPath, Leaf]:
    """The leaves of the parameter tree in the table's order, each with its tensors in the order of their layers."""
    grouped: dict[LeafPath, list[Entry]] = {}
    for entry in entries:
        grouped.setdefault(entry.path, []).append(entry)
    return {
        path: Leaf(path, group[0].leaf_shape, group[0].axes, tuple(sorted(group, key=lambda e: e.layer or 0)))
        for path, group in grouped.items()
    }


def logical_axes(entries: Iterable[Entry]) -> dict[str, Any]:
    """The parameter tree with each leaf replaced by its tuple of logical axis names."""
    return nest({path: leaf.axes for path, leaf in leaves(entries).items()})


def nest(flat: Mapping[LeafPath, Any]) -> dict[str, Any]:
    """`{("a", "b"): x}` -> `{"a": {"b": x}}`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return tree


def lookup(tree: Mapping[str, Any], path: LeafPath) -> Any:
    """The leaf at `path`; a CheckpointError names the path where there is none."""
    node: Any = tree
    for key in path:
        if not isinstance(node, Mapping) or key not in node:
            raise CheckpointError(f"the parameters have no {'/'.join(path)}")
        node = node[key]
    return node


def canonical_name(name: str) -> str:
    """A tensor's name as the checkpoints on the hub have it, from any spelling."""
    if name.startswith("model.visual."):
        return name.removeprefix("model.")
    for prefix in ("model.language_model.", "language_model."):
        if name.startswith(prefix):
            return "model." + name.removeprefix(prefix)
    return name


def is_ignored(name: str) -> bool:
    """Rotary frequencies that old versions of transformers saved; they are computed, never loaded."""
    return name.endswith(("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq"))
