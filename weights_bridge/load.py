"""Hugging Face folder -> sharded parameters, reading only the slices that this host's devices need."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from weights_bridge.entries import EMBEDDING_NAME, HEAD_NAME, Axes, Entry, LeafPath
from weights_bridge.errors import CheckpointError
from weights_bridge.host_memory import aligned_empty, copy_blocks
from weights_bridge.safetensors_file import StoredTensor, read_header
from weights_bridge.tensor_table import (
    SCORE_NAME,
    Head,
    Leaf,
    canonical_name,
    is_ignored,
    leaves,
    nest,
    read_layout,
)

ShardingOf = Callable[[LeafPath, tuple[int, ...], Axes], Sharding]

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_NAMES_SHOWN = 20


def load(
    folder: str | Path, sharding_of: ShardingOf | None = None, dtype: Any = np.float32, head: Head = "tokens"
) -> dict[str, Any]:
    """Read a checkpoint into the parameter tree.

    The files are mapped, not read: a device's part of a leaf is filled straight from the pages that hold it. On the
    host there is never more than the part of one leaf that is being handed over; CPU devices keep that memory as
    their own.

    Args:
      folder: a Hugging Face folder: config.json with model.safetensors, or with shards and their index.
      sharding_of: path, shape and logical axes of a leaf -> its sharding; None puts all on the first device.
      dtype: of the leaves. float32 holds float16 and bfloat16 sources exactly.
      head: "score" for a reward model; a head over the vocabulary that its folder has as well is not read.

    Returns:
      A nested dict of jax.Array.

    Raises:
      CheckpointError: when a file is missing or cut short, or tensors are missing, unexpected or mis-shaped.
    """
    folder = Path(folder)
    entries = read_layout(folder, head)
    stored = {canonical_name(name): tensor for name, tensor in read_stored(folder, head).items()}
    if sharding_of is None:
        single = SingleDeviceSharding(jax.local_devices()[0])
        sharding_of = lambda path, shape, axes: single  # noqa: E731
    flat = {}
    for path, leaf in leaves(entries).items():
        flat[path] = _read_leaf(leaf, stored, sharding_of(path, leaf.shape, leaf.axes), np.dtype(dtype))
    return nest(flat)


def read_stored(folder: str | Path, head: Head = "tokens") -> dict[str, StoredTensor]:
    """The folder's tensors by the names it gives them, checked against its config.json.

    Computed buffers of old checkpoints are left out. A tied checkpoint may hold its head as well, if it is the
    embedding bit for bit.

    Raises:
      CheckpointError: as `load`.
    """
    folder = Path(folder)
    entries = read_layout(folder, head)
    stored = {}
    for file in _files(folder):
        for name, tensor in read_header(file).items():
            if name in stored:
                raise CheckpointError(f"{folder}: {name} is in both {stored[name].file.name} and {file.name}")
            if not is_ignored(name):
                stored[name] = tensor
    _check(folder, entries, stored)
    return stored


def has_score(folder: str | Path) -> bool:
    """Whether a folder's weights have a score head: those of a reward model."""
    return any(canonical_name(name) == SCORE_NAME for file in _files(Path(folder)) for name in read_header(file))


def source_dtypes(folder: str | Path) -> dict[str, str]:
    """Names as the folder has them -> "float32", "float16" or "bfloat16"."""
    return {name: tensor.dtype.name for name, tensor in read_stored(folder).items()}


def _files(folder: Path) -> Sequence[Path]:
    single, index = folder / _SINGLE_FILE, folder / _INDEX_FILE
    if single.is_file():
        return [single]
    if not index.is_file():
        others = " (pickled .bin weights are not read)" if list(folder.glob("*.bin")) else ""
        raise CheckpointError(f"{folder}: neither {_SINGLE_FILE} nor {_INDEX_FILE} in it{others}")
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: is not an index of safetensors shards") from error
    absent = [shard for shard in shards if not (folder / shard).is_file()]
    if absent:
        raise CheckpointError(f"{folder}: shards named by the index are missing: {_listed(absent)}")
    return [folder / shard for shard in shards]


def _check(folder: Path, entries: Sequence[Entry], stored: dict[str, StoredTensor]) -> None:
    """Every entry present once, of its shape, and nothing else; all faults in one message."""
    names: dict[str, str] = {}
    for name in stored:
        other = names.setdefault(canonical_name(name), name)
        if other != name:
            raise CheckpointError(f"{folder}: {name} and {other} are the same tensor under two names")
    wanted = {entry.hf_name: entry for entry in entries}
    faults = []
    missing = [name for name in wanted if name not in names]
    unexpected = [name for canonical, name in names.items() if canonical not in wanted]
    if HEAD_NAME not in wanted and HEAD_NAME in names:
        unexpected.remove(HEAD_NAME)
        is_tied = SCORE_NAME not in wanted and EMBEDDING_NAME in names
        if is_tied and not _equal_bits(stored[HEAD_NAME], stored[names[EMBEDDING_NAME]]):
            faults.append(f"{HEAD_NAME} differs from the embedding although config.json ties them")
    misshaped = [
        f"{names[name]} {_shape(stored[names[name]].shape)} for {_shape(entry.shape)}"
        for name, entry in wanted.items()
        if name in names and stored[names[name]].shape != entry.shape
    ]
    for what, listed in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", misshaped)):
        if listed:
            faults.append(f"{len(listed)} {what} ({_listed(listed)})")
    if faults:
        raise CheckpointError(f"{folder}: tensors do not fit its config.json: {'; '.join(faults)}")


def _read_leaf(leaf: Leaf, stored: dict[str, StoredTensor], sharding: Sharding, dtype: np.dtype) -> jax.Array:
    """Fill and hand over one device's part after the other; devices that hold the same part are filled from one."""
    parts: dict[tuple, list] = {}
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True))
        parts.setdefault(bounds, []).append(device)
    arrays = []
    for bounds, devices in parts.items():
        part = _read_part(leaf, stored, bounds, dtype)
        placed = [jax.device_put(part, device) for device in devices]
        # Only now may the host's copy go: otherwise the parts of many leaves would wait for their transfer at once.
        jax.block_until_ready(placed)
        arrays += placed
        del part, placed
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)


def _read_part(leaf: Leaf, stored: dict[str, StoredTensor], bounds: tuple, dtype: np.dtype) -> np.ndarray:
    target = aligned_empty(tuple(stop - start for start, stop in bounds), dtype)
    index = tuple(slice(start, stop) for start, stop in bounds)
    if leaf.entries[0].layer is None:
        (entry,) = leaf.entries
        copy_blocks(target, entry.transform.to_leaf(stored[entry.hf_name].read())[index])
        return target
    for place, entry in enumerate(leaf.entries[index[0]]):
        copy_blocks(target[place], entry.transform.to_leaf(stored[entry.hf_name].read())[index[1:]])
    return target


def _equal_bits(a: StoredTensor, b: StoredTensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    left, right = a.read(), b.read()
    bits = np.uint16 if a.dtype.itemsize == 2 else np.uint32
    return all(
        np.array_equal(left[row : row + 1024].view(bits), right[row : row + 1024].view(bits))
        for row in range(0, len(left), 1024)
    )


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f", and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more


def _shape(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
