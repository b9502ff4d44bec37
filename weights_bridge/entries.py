"""One tensor of a checkpoint and its leaf in the parameter tree: what the tables of all families are made of."""

from __future__ import annotations

import dataclasses

import numpy as np

EMBEDDING_NAME = "model.embed_tokens.weight"
HEAD_NAME = "lm_head.weight"

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
class Stack:
    """Makes the entries of layer `layer` of a stack of `count`."""

    prefix: str
    leaf: str
    layer: int
    count: int

    def entry(self, name: str, leaf: str, transform: Transform, shape: tuple[int, ...], axes: Axes) -> Entry:
        """The layer's tensor of this shape, and its place in the stacked leaf."""
        path = (*self.leaf.split("/"), *leaf.split("/"))
        leaf_shape = (self.count, *transform.leaf_shape)
        return Entry(f"{self.prefix}.{name}", path, self.layer, transform, shape, leaf_shape, ("layers", *axes))

    def kernel(self, name: str, leaf: str, inputs: int, outputs: int, axes: Axes) -> Entry:
        """A linear layer's weight: [out, in] in the checkpoint, [in, out] in the tree."""
        return self.entry(name, leaf, Transform((outputs, inputs), (1, 0)), (outputs, inputs), axes)

    def vector(self, name: str, leaf: str, size: int, axis: str | None = None) -> Entry:
        """A bias or a norm's scale: the same in both."""
        return self.entry(name, leaf, Transform((size,), (0,)), (size,), (axis,))


def plain(name: str, path: str, shape: tuple[int, ...], axes: Axes) -> Entry:
    """A tensor that is its leaf, in no stack."""
    identity = Transform(shape, tuple(range(len(shape))))
    return Entry(name, tuple(path.split("/")), None, identity, shape, shape, axes)
