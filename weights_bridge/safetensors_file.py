"""safetensors files as memory maps, and written tensor by tensor.

The format is an 8-byte little-endian length, a JSON header of that length (`{name: {dtype, shape, data_offsets}}`)
and the tensors' bytes: https://huggingface.co/docs/safetensors. It is read here without the library because a
NumPy map can be reshaped and transposed before it is sliced, which turns "the part of this leaf that device 3
needs" into the pages of the file that hold it. The tests read and write the same files with the library.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from weights_bridge.errors import CheckpointError

_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_HEADER_LIMIT = 100_000_000  # the format's own


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies. `read()` maps it: no copy, and the map goes when the last view of it goes.

    Attributes:
      name: as the file has it.
      file: the safetensors file.
      offset: of its first byte in the file.
      dtype: float32, float16 or bfloat16.
      shape: its shape.
    """

    name: str
    file: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        return np.memmap(self.file, dtype=self.dtype, mode="r", offset=self.offset, shape=self.shape)


def read_header(file: str | Path) -> dict[str, StoredTensor]:
    """The tensors of one file by name.

    Raises:
      CheckpointError: when the file is missing, cut short, not safetensors, or holds another dtype than the three.
    """
    file = Path(file)
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or (length > size - 8 and length < _HEADER_LIMIT):
                raise CheckpointError(f"{file}: is cut short at {size} bytes, within its header; fetch it again")
            if length > _HEADER_LIMIT:
                raise CheckpointError(f"{file}: is not a safetensors file")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: is not a safetensors file (its header is no JSON)") from error

    tensors, end = {}, 0
    for name, about in header.items():
        if name == "__metadata__":
            continue
        try:
            code, shape = about["dtype"], tuple(int(n) for n in about["shape"])
            start, stop = (int(n) for n in about["data_offsets"])
        except (TypeError, KeyError, ValueError) as error:
            raise CheckpointError(f"{file}: the header's line on {name} is not in the safetensors format") from error
        if code not in _DTYPES:
            raise CheckpointError(f"{file}: {name} has dtype {code}; supported: {', '.join(_DTYPES)}")
        if stop - start != math.prod(shape) * _DTYPES[code].itemsize:
            raise CheckpointError(f"{file}: the header gives {name} {stop - start} bytes, which do not fit {shape}")
        tensors[name] = StoredTensor(name, file, 8 + length + start, _DTYPES[code], shape)
        end = max(end, stop)
    if size != 8 + length + end:
        what = "is cut short" if size < 8 + length + end else "has bytes after its last tensor"
        raise CheckpointError(f"{file}: {what} ({size} bytes, its header promises {8 + length + end}); fetch it again")
    return tensors


def write_file(
    file: str | Path,
    specs: Iterable[tuple[str, np.dtype, tuple[int, ...]]],
    tensors: Iterator[tuple[str, np.ndarray]],
) -> None:
    """Write one file, one tensor at a time.

    Args:
      file: where; it must not exist.
      specs: name, dtype and shape of each tensor.
      tensors: the tensors in the order of `specs`; what is left in the iterator stays there.
    """
    specs = list(specs)
    # Readers expect every tensor aligned to its element: wide elements go first, as the library does it.
    placed, offset = {}, 0
    for name, dtype, shape in sorted(specs, key=lambda spec: (-np.dtype(spec[1]).itemsize, spec[0])):
        stop = offset + math.prod(shape) * np.dtype(dtype).itemsize
        placed[name] = {"dtype": _CODES[np.dtype(dtype)], "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    # transformers refuses a file without this line of metadata.
    header = json.dumps({"__metadata__": {"format": "pt"}, **placed}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with Path(file).open("xb") as stream:
        stream.write(len(header).to_bytes(8, "little"))
        stream.write(header)
        for expected, dtype, shape in specs:
            name, tensor = next(tensors)
            if (name, tensor.dtype, tensor.shape) != (expected, np.dtype(dtype), tuple(shape)):
                raise ValueError(f"expected {expected} {dtype} {shape}, got {name} {tensor.dtype} {tensor.shape}")
            stream.seek(8 + len(header) + placed[name]["data_offsets"][0])
            stream.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8))
        stream.truncate(8 + len(header) + offset)
        stream.flush()
        os.fsync(stream.fileno())
