"""Parameters as a stream of checkpoint tensors: into files when a model is exported, into engines when it is synced."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from weights_bridge.errors import CheckpointError
from weights_bridge.host_memory import copy_blocks
from weights_bridge.layout import EMBEDDING_NAME, HEAD_NAME, Entry, Transform, canonical_name, lookup


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
    a consumer that keeps one past its turn must copy it.

    On accelerators each tensor is cut out of its stack, transposed and gathered by a small program on the devices,
    and what comes next is on its way to the host while the consumer has this: the stream holds one tensor (iterated)
    or one bucket (`buckets`) beyond what the consumer keeps, on the host and, but for the moment of handing one over,
    on a device. On CPUs the host does it, tensor by tensor, when it is asked.

    Parameters that are spread over several processes are gathered by all of them together: each process must go
    through the same stream to its end, one that has no use for the tensors by `follow`.

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
        for_engines: bool = False,
    ):
        """
        Args:
          params: nested dict of jax.Array (of any sharding) or np.ndarray.
          entries: the model's table.
          stored: names to give -> dtype of each, as `load.source_dtypes` returns them; canonical names and the
            leaves' own dtypes without it. A tied model whose source held its head gets it again.
          dtype: one dtype for all tensors, over `stored`'s.
          bucket_bytes: largest bucket of `buckets`; a tensor that is larger is a bucket by itself.
          for_engines: also cast on the devices, so that half as many bytes come to the host (XLA may round
            subnormal numbers to zero there, which a file should not suffer), and always send a tied model's head,
            the embedding once more: an engine that is updated without it goes on with its old head.

        Raises:
          CheckpointError: when parameters and table, or table and `stored`, do not fit together.
        """
        self._params = params
        self._bucket_bytes = bucket_bytes
        self._cast_on_devices = for_engines
        self._entries, specs = [], []
        for name, entry in _named(entries, stored, with_head=for_engines):
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
        for batch in self._batches([[number] for number in range(len(self))]):
            yield batch.pop()

    def buckets(self) -> Iterator[list[tuple[str, np.ndarray]]]:
        """The same tensors in lists of at most `bucket_bytes`.

        A loop's variable keeps its bucket until the next one has been made; a consumer that cannot afford two
        deletes it when it is done.
        """
        return self._batches(split([spec.nbytes for spec in self.specs], self._bucket_bytes))

    def on_device(self) -> Iterator[tuple[str, jax.Array]]:
        """The same tensors left on one device, each made when it is asked for: what engines on GPUs can read there."""
        for number, spec in enumerate(self.specs):
            yield spec.name, self._make(number, spec.dtype)

    def follow(self) -> None:
        """Take part in the gathers of a process that iterates, and copy nothing to this process's host."""
        for number in range(len(self)):
            jax.block_until_ready(self._begin(number))

    def _batches(self, batches: Sequence[Sequence[int]]) -> Iterator[list[tuple[str, np.ndarray]]]:
        coming = self._begin_all(batches[0])
        for batch, following in zip(batches, [*batches[1:], []], strict=True):
            begun, coming = coming, self._begin_all(following)
            # Handed out without a name of ours: what the consumer drops is gone.
            yield [(self.specs[number].name, self._finish(number, begun.pop(number))) for number in batch]

    def _begin_all(self, batch: Iterable[int]) -> dict[int, jax.Array | None]:
        begun = {number: self._begin(number) for number in batch}
        for tensor in begun.values():
            if tensor is not None:
                tensor.copy_to_host_async()
        return begun

    def _begin(self, number: int) -> jax.Array | None:
        """Start to make a tensor on a device; None where the host makes it."""
        leaf = self._leaf(number)
        if _is_on_host(leaf):
            return None
        return self._make(number, self.specs[number].dtype if self._cast_on_devices else leaf.dtype)

    def _make(self, number: int, dtype: np.dtype) -> jax.Array:
        # The copies of the other devices go at once.
        return on_devices(self._leaf(number), self._entries[number], dtype).addressable_data(0)

    def _leaf(self, number: int) -> Any:
        """A tensor's leaf; where every device holds all of it, one device's copy: nothing needs to be gathered."""
        leaf = lookup(self._params, self._entries[number].path)
        if isinstance(leaf, jax.Array) and leaf.is_fully_replicated and len(leaf.sharding.device_set) > 1:
            return leaf.addressable_data(0)
        return leaf

    def _finish(self, number: int, begun: jax.Array | None) -> np.ndarray:
        """The tensor on the host."""
        entry, dtype = self._entries[number], self.specs[number].dtype
        if begun is None:
            return _on_host(self._leaf(number), entry, dtype)
        tensor = np.asarray(begun)
        if tensor.dtype == dtype:
            return tensor
        # Casting here and not on the device keeps every bit, subnormal numbers included.
        cast = np.empty(tensor.shape, dtype)
        copy_blocks(cast, tensor)
        return cast


def split(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """The places of tensors bucket by bucket: each of at most `limit` bytes, or of one tensor."""
    buckets: list[list[int]] = [[]]
    held = 0
    for number, size in enumerate(sizes):
        if buckets[-1] and held + size > limit:
            buckets.append([])
            held = 0
        buckets[-1].append(number)
        held += size
    return buckets


def on_devices(leaf: Any, entry: Entry, dtype: Any) -> jax.Array:
    """An entry's tensor made on its leaf's devices, whole on each of them; a program per shape, whatever the layer.

    Parameters over several devices, or several processes, are gathered by the program itself, after the cast.
    """
    leaf = jnp.asarray(leaf)
    layer = None if entry.layer is None else np.int32(entry.layer)
    replicated = None
    if len(leaf.sharding.device_set) > 1:
        replicated = NamedSharding(leaf.sharding.mesh, PartitionSpec())
    return _program(replicated)(leaf, layer, entry.transform, entry.shape, np.dtype(dtype))


@functools.cache
def _program(out_sharding: NamedSharding | None) -> Callable[..., jax.Array]:
    def tensor(leaf: jax.Array, layer: Any, transform: Transform, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        if layer is not None:
            # Where layers are spread over devices XLA adds the one that has it to the others' zeros: as integers,
            # it keeps every bit. (A dynamic slice would gather the whole stack first.)
            bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}")
            leaf = jax.lax.bitcast_convert_type(jnp.take(bits, layer, axis=0, mode="clip"), leaf.dtype)
        return transform.to_source(leaf.astype(dtype), shape)

    return jax.jit(tensor, static_argnums=(2, 3, 4), out_shardings=out_sharding)


def _named(entries: Sequence[Entry], stored: Mapping[str, Any] | None, with_head: bool) -> list[tuple[str, Entry]]:
    """The table's entries under the names to give."""
    names = [entry.hf_name for entry in entries]
    if stored is None:
        given = {name: name for name in [*names, *([HEAD_NAME] if with_head else [])]}
    else:
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


def _is_on_host(leaf: Any) -> bool:
    """Whether this process's host can read all of a leaf where it lies."""
    if not isinstance(leaf, jax.Array):
        return True
    return leaf.is_fully_addressable and all(device.platform == "cpu" for device in leaf.devices())


def _on_host(leaf: Any, entry: Entry, dtype: np.dtype) -> np.ndarray:
    """An entry's tensor from what the host can read: a view where that is enough, else one copy that does it all."""
    layer = entry.layer
    if not isinstance(leaf, jax.Array) or len(leaf.devices()) == 1:
        part = np.asarray(leaf) if layer is None else np.asarray(leaf)[layer]
        turned = part.transpose(np.argsort(entry.transform.order))
        if turned.dtype == dtype and turned.flags.c_contiguous:
            return turned.reshape(entry.shape)
        parts = [((), part)]
    else:
        parts = list(_parts(leaf, layer))
    tensor = np.empty(entry.shape, dtype)
    as_leaf = entry.transform.to_leaf(tensor)
    for index, part in parts:
        copy_blocks(as_leaf[index], part)
    return tensor


def _parts(leaf: jax.Array, layer: int | None) -> Iterator[tuple[tuple, np.ndarray]]:
    """Views of the devices' parts of a leaf, or of one layer of it, and their places in it."""
    for shard in leaf.addressable_shards:
        if shard.replica_id != 0:
            continue
        if layer is None:
            yield shard.index, np.asarray(shard.data)
            continue
        start, stop, _ = shard.index[0].indices(leaf.shape[0])
        if start <= layer < stop:
            yield shard.index[1:], np.asarray(shard.data)[layer - start]
