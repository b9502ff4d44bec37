"""Parameters as a stream of checkpoint tensors: into files when a model is exported, into engines when it is synced."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from weights_bridge.errors import CheckpointError
from weights_bridge.host_memory import copy_blocks
from weights_bridge.layout import EMBEDDING_NAME, HEAD_NAME, Entry, canonical_name, lookup


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """What a tensor of the stream will be, known before it is made."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorStream:
    """Iterates over (name, array), anew each time, in an order that is the same each time.

    Arrays are NumPy, C-contiguous, in the shapes of the checkpoint, and may be read-only views of the parameters:
    a consumer that keeps one past its turn must copy it. Only the tensor at hand is gathered from the devices, so
    the host holds one tensor, or one bucket, beside what it holds anyway.

    Attributes:
      specs: the tensors to come, in order.
    """

    def __init__(
        self,
        params: Mapping[str, Any],
        entries: Sequence[Entry],
        *,
        stored: Mapping[str, Any] | None = None,
        dtype: Any = None,
        bucket_bytes: int = 256 << 20,
    ):
        """
        Args:
          params: nested dict of jax.Array (of any sharding) or np.ndarray.
          entries: the model's table.
          stored: names to give -> dtype of each, as `load.source_dtypes` returns them; canonical names and the
            leaves' own dtypes without it. A tied model whose source held its head gets it again.
          dtype: one dtype for all tensors, over `stored`'s.
          bucket_bytes: largest bucket of `buckets`; a tensor that is larger is a bucket by itself.

        Raises:
          CheckpointError: when parameters and table, or table and `stored`, do not fit together.
        """
        self._params = params
        self._bucket_bytes = bucket_bytes
        self._entries, specs = [], []
        for name, entry in _named(entries, stored):
            leaf = lookup(params, entry.path)
            if tuple(leaf.shape) != entry.leaf_shape:
                raise CheckpointError(
                    f"parameter {'/'.join(entry.path)} is {list(leaf.shape)}, the config says {list(entry.leaf_shape)}"
                )
            chosen = dtype if dtype is not None else (stored[name] if stored is not None else leaf.dtype)
            self._entries.append(entry)
            specs.append(TensorSpec(name, np.dtype(chosen), entry.shape))
        self.specs = tuple(specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        for entry, spec in zip(self._entries, self.specs, strict=True):
            yield spec.name, _tensor(lookup(self._params, entry.path), entry, spec.dtype)

    def buckets(self) -> Iterator[list[tuple[str, np.ndarray]]]:
        """The same tensors in lists of at most `bucket_bytes`."""
        bucket, held = [], 0
        for spec, tensor in zip(self.specs, self, strict=True):
            if bucket and held + spec.nbytes > self._bucket_bytes:
                yield bucket
                bucket, held = [], 0
            bucket.append(tensor)
            held += spec.nbytes
        if bucket:
            yield bucket


def _named(entries: Sequence[Entry], stored: Mapping[str, Any] | None) -> list[tuple[str, Entry]]:
    """The table's entries under the names to give."""
    if stored is None:
        return [(entry.hf_name, entry) for entry in entries]
    given = {canonical_name(name): name for name in stored}
    named = [(given.pop(entry.hf_name, None), entry) for entry in entries]
    missing = [entry.hf_name for name, entry in named if name is None]
    if HEAD_NAME in given:
        embedding = next(entry for entry in entries if entry.hf_name == EMBEDDING_NAME)
        named.append((given.pop(HEAD_NAME), embedding))
    if missing or given:
        raise CheckpointError(
            f"the source's tensors do not fit its config.json: missing {missing[:5]}, unexpected {list(given)[:5]}"
        )
    return named


def _tensor(leaf: Any, entry: Entry, dtype: np.dtype) -> np.ndarray:
    if isinstance(leaf, jax.Array):
        part = _gather(leaf, entry.layer)
    else:
        part = np.asarray(leaf) if entry.layer is None else np.asarray(leaf)[entry.layer]
    # Casting here and not on the device keeps every bit, subnormal numbers included.
    turned = part.transpose(np.argsort(entry.transform.order))
    if turned.dtype == dtype and turned.flags.c_contiguous:
        return turned.reshape(entry.shape)
    tensor = np.empty(turned.shape, dtype)
    copy_blocks(tensor, turned)
    return tensor.reshape(entry.shape)


def _gather(leaf: jax.Array, layer: int | None) -> np.ndarray:
    """A leaf, or one layer of it, on the host, put together from the devices' parts."""
    if not leaf.is_fully_addressable:
        raise CheckpointError("parameters spread over several processes cannot be streamed from one of them")
    shards = [shard for shard in leaf.addressable_shards if shard.replica_id == 0]
    if len(shards) == 1:
        return _to_host(shards[0].data, layer)
    whole = np.empty(leaf.shape if layer is None else leaf.shape[1:], leaf.dtype)
    for shard in shards:
        if layer is None:
            whole[shard.index] = _to_host(shard.data, None)
            continue
        start, stop, _ = shard.index[0].indices(leaf.shape[0])
        if start <= layer < stop:
            whole[shard.index[1:]] = _to_host(shard.data, layer - start)
    return whole


def _to_host(data: jax.Array, layer: int | None) -> np.ndarray:
    (device,) = data.devices()
    if layer is None:
        return np.asarray(data)
    if device.platform == "cpu":
        return np.asarray(data)[layer]  # a view; on another device this would fetch, and keep, all layers for one
    return np.asarray(one_layer(data, layer))


@jax.jit
def one_layer(stacked: jax.Array, layer: int) -> jax.Array:
    """A layer of a stacked leaf, on the leaf's device; one small program per shape, whatever the layer."""
    return jax.lax.dynamic_index_in_dim(stacked, layer, keepdims=False)
