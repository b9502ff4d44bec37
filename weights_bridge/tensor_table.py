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

A reward model has the same table with `score.weight` instead of the head over the vocabulary.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from weights_bridge.errors import CheckpointError

SUPPORTED_MODEL_TYPES = ("qwen2", "qwen2_vl", "qwen2_5_vl")
EMBEDDING_NAME = "model.embed_tokens.weight"
HEAD_NAME = "lm_head.weight"
SCORE_NAME = "score.weight"

Head = Literal["tokens", "score"]
"""What the hidden states end in: logits over the vocabulary, or a reward model's one number."""
LeafPath = tuple[str, ...]
Axes = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class Transform:
    """A reshape followed by a transposition: enough for every tensor of the supported families, and invertible.

    Both ways work on views wherever NumPy can make one. So `transform.to_leaf(mapped_file)[index]` is the way from
    an index into the leaf to the bytes of the file that it needs, and nothing else is read.

    Example, the vision tower's fused projection: the file holds [3*out, in], rows ordered query, key, value.
    view (3, out, in), order (2, 0, 1) gives the leaf [in, 3, out].

    Attributes:
      view: shape that the source tensor is reshaped to.
      order: permutation of the axes of `view` that gives the leaf.
    """

    view: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def leaf_shape(self) -> tuple[int, ...]:
        """Shape of the leaf, or of one layer of a stacked leaf."""
        return tuple(self.view[axis] for axis in self.order)

    def to_leaf(self, tensor: np.ndarray) -> np.ndarray:
        """Source tensor -> leaf (one layer of it), a view of the same memory."""
        return tensor.reshape(self.view).transpose(self.order)

    def to_source(self, leaf: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Leaf (one layer of it) -> source tensor of shape `shape`, the inverse of `to_leaf`."""
        return leaf.transpose(np.argsort(self.order)).reshape(shape)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of the checkpoint.

    Attributes:
      hf_name: its canonical name.
      path: keys of its leaf in the parameter tree.
      layer: its place on axis 0 of a stacked leaf, None where the leaf is this tensor alone.
      transform: the way between the tensor and the leaf without its layer axis.
      shape: the tensor's shape in the checkpoint.
      leaf_shape: the whole leaf's shape, layer axis included.
      axes: a logical name for each axis of the leaf, for the sharding rules; None is never sharded.
    """

    hf_name: str
    path: LeafPath
    layer: int | None
    transform: Transform
    shape: tuple[int, ...]
    leaf_shape: tuple[int, ...]
    axes: Axes


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf of the parameter tree: its whole shape, its logical axes, and the tensors that fill it in order."""

    path: LeafPath
    shape: tuple[int, ...]
    axes: Axes
    entries: tuple[Entry, ...]


def layout(config: Mapping[str, Any], head: Head = "tokens") -> tuple[Entry, ...]:
    """The table for a model.

    Args:
      config: the contents of `config.json`, with the text model's fields at the top (old) or under `text_config`.
      head: "score" for a reward model, which has `score/kernel` [D, 1] and no head over the vocabulary.

    Raises:
      CheckpointError: for a model type that is not supported or a field that is missing.
    """
    model_type = config.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise CheckpointError(
            f"model_type {model_type!r} in config.json is not supported; supported: {', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    text = _text_config(config)
    entries = list(_text_entries(text, with_head=head == "tokens" and not is_tied(config)))
    if model_type != "qwen2":
        entries += _vision_entries(model_type, _field(config, "vision_config"))
    if head == "score":
        width = _size(text, "hidden_size")
        transform = Transform((1, width), (1, 0))
        entries.append(Entry(SCORE_NAME, ("score", "kernel"), None, transform, (1, width), (width, 1), ("embed", None)))
    return tuple(entries)


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the output head is the embedding; either level of the config may say so, and the default is no."""
    text = config.get("text_config") or {}
    return bool(config.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", False))


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


def read_model_config(folder: str | Path) -> dict[str, Any]:
    """`config.json` of a Hugging Face folder as it stands.

    Raises:
      CheckpointError: when folder or file is missing or the file is not JSON.
    """
    path = Path(folder) / "config.json"
    if not Path(folder).is_dir():
        raise CheckpointError(f"{folder}: no such folder; a Hugging Face checkpoint folder is needed")
    if not path.is_file():
        raise CheckpointError(f"{folder}: no config.json in it; a Hugging Face checkpoint folder is needed")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: holds no JSON object")
    return config


def read_layout(folder: str | Path, head: Head = "tokens") -> tuple[Entry, ...]:
    """The table for the model in a Hugging Face folder.

    Raises:
      CheckpointError: as `read_model_config` and `layout`; the message names the folder.
    """
    config = read_model_config(folder)
    try:
        return layout(config, head)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def _text_entries(text: Mapping[str, Any], *, with_head: bool) -> Iterator[Entry]:
    width, layers = _size(text, "hidden_size"), _size(text, "num_hidden_layers")
    feed, vocab = _size(text, "intermediate_size"), _size(text, "vocab_size")
    heads = _size(text, "num_attention_heads")
    kv_heads = text.get("num_key_value_heads") or heads
    head_dim = text.get("head_dim") or width // heads
    q, kv = heads * head_dim, kv_heads * head_dim

    yield _plain(EMBEDDING_NAME, "language/embed/embedding", (vocab, width), ("vocab", "embed"))
    for n in range(layers):
        stack = _Stack(f"model.layers.{n}", "language/layers", n, layers)
        yield stack.vector("input_layernorm.weight", "input_norm/scale", width)
        for name, leaf, size, axis in (("q", "query", q, "heads"), ("k", "key", kv, "kv_heads"),
                                       ("v", "value", kv, "kv_heads")):
            yield stack.kernel(f"self_attn.{name}_proj.weight", f"{leaf}/kernel", width, size, ("embed", axis))
            yield stack.vector(f"self_attn.{name}_proj.bias", f"{leaf}/bias", size, axis)
        yield stack.kernel("self_attn.o_proj.weight", "output/kernel", q, width, ("heads", "embed"))
        yield stack.vector("post_attention_layernorm.weight", "mlp_norm/scale", width)
        yield stack.kernel("mlp.gate_proj.weight", "gate/kernel", width, feed, ("embed", "mlp"))
        yield stack.kernel("mlp.up_proj.weight", "up/kernel", width, feed, ("embed", "mlp"))
        yield stack.kernel("mlp.down_proj.weight", "down/kernel", feed, width, ("mlp", "embed"))
    yield _plain("model.norm.weight", "language/norm/scale", (width,), (None,))
    if with_head:
        yield _plain(HEAD_NAME, "language/head/embedding", (vocab, width), ("vocab", "embed"))


def _vision_entries(model_type: str, vision: Mapping[str, Any]) -> Iterator[Entry]:
    old = model_type == "qwen2_vl"
    width = _size(vision, "embed_dim" if old else "hidden_size")
    out = _size(vision, "hidden_size" if old else "out_hidden_size")
    feed = int(width * vision.get("mlp_ratio", 4)) if old else _size(vision, "intermediate_size")
    depth, patch = _size(vision, "depth"), vision.get("patch_size", 14)
    channels, frames = vision.get("in_channels", 3), vision.get("temporal_patch_size", 2)
    merged = width * vision.get("spatial_merge_size", 2) ** 2
    values = channels * frames * patch * patch

    yield Entry(
        "visual.patch_embed.proj.weight", ("vision", "patch", "kernel"), None, Transform((width, values), (1, 0)),
        (width, channels, frames, patch, patch), (values, width), ("patch", "vision_embed"),
    )
    for n in range(depth):
        stack = _Stack(f"visual.blocks.{n}", "vision/blocks", n, depth)
        for norm in ("norm1", "norm2"):
            yield stack.vector(f"{norm}.weight", f"{norm}/scale", width)
            if old:
                yield stack.vector(f"{norm}.bias", f"{norm}/bias", width)
        yield stack.entry(
            "attn.qkv.weight", "qkv/kernel", Transform((3, width, width), (2, 0, 1)), (3 * width, width),
            ("vision_embed", None, "vision_heads"),
        )
        yield stack.entry(
            "attn.qkv.bias", "qkv/bias", Transform((3, width), (0, 1)), (3 * width,), (None, "vision_heads")
        )
        yield stack.kernel("attn.proj.weight", "proj/kernel", width, width, ("vision_heads", "vision_embed"))
        yield stack.vector("attn.proj.bias", "proj/bias", width)
        inward = (("mlp.fc1", "fc1"),) if old else (("mlp.gate_proj", "gate"), ("mlp.up_proj", "up"))
        outward = ("mlp.fc2", "fc2") if old else ("mlp.down_proj", "down")
        for name, leaf in inward:
            yield stack.kernel(f"{name}.weight", f"{leaf}/kernel", width, feed, ("vision_embed", "vision_mlp"))
            yield stack.vector(f"{name}.bias", f"{leaf}/bias", feed, "vision_mlp")
        name, leaf = outward
        yield stack.kernel(f"{name}.weight", f"{leaf}/kernel", feed, width, ("vision_mlp", "vision_embed"))
        yield stack.vector(f"{name}.bias", f"{leaf}/bias", width)

    yield _plain("visual.merger.ln_q.weight", "vision/merger/norm/scale", (width,), (None,))
    if old:
        yield _plain("visual.merger.ln_q.bias", "vision/merger/norm/bias", (width,), (None,))
    for name, leaf, size, axes in (("0", "fc1", merged, ("vision_embed", "vision_mlp")),
                                   ("2", "fc2", out, ("vision_mlp", "embed"))):
        yield Entry(
            f"visual.merger.mlp.{name}.weight", ("vision", "merger", leaf, "kernel"), None,
            Transform((size, merged), (1, 0)), (size, merged), (merged, size), axes,
        )
        bias_axis = axes[1] if leaf == "fc1" else None
        yield _plain(f"visual.merger.mlp.{name}.bias", f"vision/merger/{leaf}/bias", (size,), (bias_axis,))


@dataclasses.dataclass(frozen=True)
class _Stack:
    """Makes the entries of layer `layer` of a stack of `count`."""

    prefix: str
    leaf: str
    layer: int
    count: int

    def entry(self, name: str, leaf: str, transform: Transform, shape: tuple[int, ...], axes: Axes) -> Entry:
        path = (*self.leaf.split("/"), *leaf.split("/"))
        leaf_shape = (self.count, *transform.leaf_shape)
        return Entry(f"{self.prefix}.{name}", path, self.layer, transform, shape, leaf_shape, ("layers", *axes))

    def kernel(self, name: str, leaf: str, inputs: int, outputs: int, axes: Axes) -> Entry:
        """A linear layer's weight: [out, in] in the checkpoint, [in, out] in the tree."""
        return self.entry(name, leaf, Transform((outputs, inputs), (1, 0)), (outputs, inputs), axes)

    def vector(self, name: str, leaf: str, size: int, axis: str | None = None) -> Entry:
        return self.entry(name, leaf, Transform((size,), (0,)), (size,), (axis,))


def _plain(name: str, path: str, shape: tuple[int, ...], axes: Axes) -> Entry:
    identity = Transform(shape, tuple(range(len(shape))))
    return Entry(name, tuple(path.split("/")), None, identity, shape, shape, axes)


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The text model's fields. Some releases wrote them at both levels; `text_config` is then the complete one."""
    text = config.get("text_config")
    return {**config, **text} if isinstance(text, Mapping) else config


def _field(config: Mapping[str, Any], name: str) -> Any:
    if config.get(name) is None:
        raise CheckpointError(f"config.json has no {name}")
    return config[name]


def _size(config: Mapping[str, Any], name: str) -> int:
    value = _field(config, name)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise CheckpointError(f"config.json: {name} is {value!r}, a positive whole number is needed")
    return value
