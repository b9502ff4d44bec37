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

from weights_bridge.entries import EMBEDDING_NAME, HEAD_NAME, Entry, Transform
from weights_bridge.errors import CheckpointError
from weights_bridge.host_memory import copy_blocks
from weights_bridge.tensor_table import canonical_name, lookup


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """What a tensor of the stream will be, known before it is made."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Piece:
    """A tensor on its way to an engine, or a part of one that is larger than a bucket.

    Attributes:
      name: the tensor's.
      start: the byte of it, in the order of its elements, at which the piece begins.
      data: uint8 `[bytes]`, for the other side may not know NumPy's bfloat16.
    """

    name: str
    start: int
    data: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Plan:
    """A piece to be made.

    Attributes:
      number: the tensor's place in the stream.
      rows: of its transform's view.
      start: as in `Piece`.
      nbytes: of the piece.
      place: of its first byte in the bucket.
    """

    number: int
    rows: slice
    start: int
    nbytes: int
    place: int


class TensorStream:
    """Iterates over (name, array), anew each time, in an order that is the same each time.

    Arrays are NumPy, C-contiguous, in the shapes of the checkpoint, and may be read-only views of the parameters:
    a consumer that keeps one past its turn must copy it.

    On accelerators each tensor is cut out of its stack, transposed and gathered by a small program on the devices,
    and what comes next is on its way to the host while the consumer has this: the stream holds one tensor (iterated)
    or one bucket (`buckets`) beyond what the consumer keeps, on the host and, but for the moment of handing one over,
    on a device. On CPUs the host does it when it is asked, of a tensor that is larger than a bucket no more than that.

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
          bucket_bytes: largest bucket of `buckets`.
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
        coming = self._begin_all([0])
        for number, spec in enumerate(self.specs):
            begun, coming = coming.pop(number), self._begin_all([number + 1] if number + 1 < len(self) else [])
            # Handed out without a name of ours: what the consumer drops is gone.
            yield spec.name, self._finish(number, begun)
            del begun

    def buckets(self) -> Iterator[list[Piece]]:
        """The same tensors in lists of at most `bucket_bytes`, or of one row; larger tensors in pieces, one after
        another.

        The pieces of a bucket are valid until the next one is asked for: the host makes all buckets in one memory. A
        loop's variable keeps what came from a device until the next bucket has been made; a consumer that cannot
        afford two deletes it when it is done.
        """
        plan = self._plan()
        memory = np.empty(max(bucket[-1].place + bucket[-1].nbytes for bucket in plan), np.uint8)
        begun = self._begin_all(piece.number for piece in plan[0])
        for bucket, following in zip(plan, [*plan[1:], []], strict=True):
            begun |= self._begin_all(piece.number for piece in following if piece.start == 0)
            yield [self._piece(piece, begun, memory) for piece in bucket]

    def on_device(self) -> Iterator[tuple[str, jax.Array]]:
        """The same tensors left on one device, each made when it is asked for: what engines on GPUs can read there."""
        for number, spec in enumerate(self.specs):
            yield spec.name, self._make(number, spec.dtype)

    def follow(self) -> None:
        """Take part in the gathers of a process that iterates, and copy nothing to this process's host."""
        for number in range(len(self)):
            jax.block_until_ready(self._begin(number))

    def _plan(self) -> list[list[_Plan]]:
        """What goes into which bucket."""
        plan = []
        for numbers in split([spec.nbytes for spec in self.specs], self._bucket_bytes):
            bucket, end = [], 0
            for number in numbers:
                nbytes, count = self.specs[number].nbytes, self._entries[number].transform.view[0]
                bucket.append(_Plan(number, slice(0, count), 0, nbytes, end))
                end += nbytes
            if end <= self._bucket_bytes:
                plan.append(bucket)
                continue
            row = nbytes // count
            step = max(1, self._bucket_bytes // row)
            for start in range(0, count, step):
                rows = slice(start, min(start + step, count))
                plan.append([_Plan(number, rows, start * row, (rows.stop - start) * row, 0)])
        return plan

    def _piece(self, piece: _Plan, begun: dict[int, jax.Array | np.ndarray | None], memory: np.ndarray) -> Piece:
        """Makes a piece, in `memory` where the host does it; forgets what was begun with the tensor's last."""
        spec, entry = self.specs[piece.number], self._entries[piece.number]
        if begun[piece.number] is None:
            room = memory[piece.place : piece.place + piece.nbytes]
            made = _on_host(self._leaf(piece.number), entry, spec.dtype, piece.rows, room).view(np.uint8)
        else:
            begun[piece.number] = whole = self._finish(piece.number, begun[piece.number])
            made = whole.reshape(-1).view(np.uint8)[piece.start : piece.start + piece.nbytes]
        if piece.start + piece.nbytes == spec.nbytes:
            del begun[piece.number]
        return Piece(spec.name, piece.start, made)

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
            rows = slice(0, entry.transform.view[0])
            return _on_host(self._leaf(number), entry, dtype, rows).reshape(entry.shape)
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


def _on_host(
    leaf: Any, entry: Entry, dtype: np.dtype, rows: slice, room: np.ndarray | None = None
) -> np.ndarray:
    """Some of an entry's tensor from what the host can read: a view where that is enough, else one copy that does it
    all.

    Args:
      rows: of the view of the entry's transform.
      room: uint8, memory for the copy; None makes new.

    Returns:
      Of `dtype`, flat.
    """
    order, layer = entry.transform.order, entry.layer
    axis = order.index(0)  # where the leaf has these rows
    if not isinstance(leaf, jax.Array) or len(leaf.devices()) == 1:
        part = np.asarray(leaf) if layer is None else np.asarray(leaf)[layer]
        turned = part[(slice(None),) * axis + (rows,)].transpose(np.argsort(order))
        if turned.dtype == dtype and turned.flags.c_contiguous:
            return turned.reshape(-1)
        parts = [((slice(None),) * part.ndim, part)]
    else:
        parts = list(_parts(leaf, layer))
    shape = (rows.stop - rows.start, *entry.transform.view[1:])
    made = np.empty(math.prod(shape), dtype) if room is None else room.view(dtype)
    as_leaf = made.reshape(shape).transpose(order)
    for index, part in parts:
        start, stop, _ = index[axis].indices(entry.transform.view[0])
        low, high = max(start, rows.start), min(stop, rows.stop)
        if low < high:
            place = (*index[:axis], slice(low - rows.start, high - rows.start), *index[axis + 1 :])
            copy_blocks(as_leaf[place], part[(slice(None),) * axis + (slice(low - start, high - start),)])
    return made


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
