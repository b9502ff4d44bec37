"""Parameters -> a complete Hugging Face folder, which transformers and vLLM open as it is.

    python -m weights_bridge.export --checkpoint WHAT --out DIR [--dtype float32]

WHAT is a run's folder (its newest checkpoint), one of a run's checkpoints, or a Hugging Face folder.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from weights_bridge.errors import CheckpointError
from weights_bridge.host_memory import copy_blocks
from weights_bridge.load import read_stored
from weights_bridge.run_checkpoint import (
    SOURCE_DTYPES_FILE,
    copy_files,
    is_step_folder,
    newest_step,
    read_orbax_params,
    stored_dtypes,
)
from weights_bridge.safetensors_file import write_file
from weights_bridge.stream import TensorSpec, TensorStream
from weights_bridge.tensor_table import read_layout

DTYPES = ("float32", "bfloat16", "float16")
MAX_SHARD_BYTES = 5_000_000_000


def export(
    params: Mapping[str, Any],
    source_folder: str | Path,
    out_folder: str | Path,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write parameters as a Hugging Face folder. It appears whole, under its name, or not at all.

    Args:
      params: the parameter tree, on any devices.
      source_folder: where they came from: a Hugging Face folder or a run's `model` folder. Tensor names, dtypes and
        everything beside the weights are taken from it.
      out_folder: must not exist, or be empty.
      dtype: "float32", "bfloat16" or "float16"; None is each source tensor's own.
      max_shard_bytes: weights are split into files of at most this size (a larger tensor has its own).

    Raises:
      CheckpointError: when the out folder is in use, or parameters and source do not fit together.
    """
    _check_out(Path(out_folder))
    stored = stored_dtypes(source_folder)
    stream = TensorStream(params, read_layout(source_folder), stored=stored, dtype=dtype)
    _write_folder(stream.specs, iter(stream), source_folder, out_folder, dtype, max_shard_bytes)


def export_checkpoint(
    what: str | Path, out_folder: str | Path, dtype: str | None = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """`export` of a run's folder, one of its checkpoints, or a Hugging Face folder.

    Raises:
      CheckpointError: as `export`, and when `what` is none of the three.
    """
    _check_out(Path(out_folder))
    what = Path(what).absolute()
    if not what.is_dir():
        raise CheckpointError(f"{what}: no such folder")
    run = _run_of(what)
    if run is None:
        if not (what / "config.json").is_file():
            raise CheckpointError(
                f"{what}: is neither a run's folder, nor a whole checkpoint of one, nor a Hugging Face folder"
            )
        _export_hugging_face(what, Path(out_folder), dtype, max_shard_bytes)
        return
    step = what if is_step_folder(what) else newest_step(run)
    if step is None:
        raise CheckpointError(f"{run}: the run has no whole checkpoint yet")
    if not (run / "model" / SOURCE_DTYPES_FILE).is_file():
        raise CheckpointError(f"{run}: the run has no model/{SOURCE_DTYPES_FILE}, which an export is made after")
    export(read_orbax_params(step), run / "model", out_folder, dtype, max_shard_bytes)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = _OneLineParser(prog="python -m weights_bridge.export", description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", required=True, metavar="WHAT",
                        help="a run's folder (its newest checkpoint), a run's checkpoint, or a Hugging Face folder")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write; new or empty")
    parser.add_argument("--dtype", choices=DTYPES, default=None,
                        help="of the written tensors (default: the source tensors' own; float32: the master weights)")
    options = parser.parse_args(arguments)
    # Orbax narrates at warning level, and leaves asyncio to report every array of a spoilt checkpoint by itself.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        export_checkpoint(options.checkpoint, options.out, options.dtype)
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or options.out}: {error.strerror or error}", file=sys.stderr)
        return 2
    print(f"wrote {options.out}")
    return 0


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str):
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def _run_of(what: Path) -> Path | None:
    """The run's folder that `what`, its `checkpoints` or one of those belongs to; None for any other folder."""
    if is_step_folder(what):
        return what.parent.parent
    if what.name == "checkpoints":
        return what.parent
    return what if (what / "checkpoints").is_dir() else None


def _export_hugging_face(source: Path, out: Path, dtype: str | None, max_shard_bytes: int) -> None:
    """The same tensors in another dtype or other shards, straight from file to file."""
    stored = read_stored(source)
    specs = [TensorSpec(name, np.dtype(dtype or t.dtype), t.shape) for name, t in stored.items()]

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for spec in specs:
            tensor = np.empty(spec.shape, spec.dtype)
            copy_blocks(tensor, stored[spec.name].read())
            yield spec.name, tensor

    _write_folder(specs, tensors(), source, out, dtype, max_shard_bytes)


def _write_folder(
    specs: Sequence[TensorSpec],
    tensors: Iterator[tuple[str, np.ndarray]],
    source: str | Path,
    out_folder: str | Path,
    dtype: str | None,
    max_shard_bytes: int,
) -> None:
    out = Path(out_folder).absolute()
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        copy_files(source, partial)
        if dtype is not None:
            _set_config_dtype(partial / "config.json", dtype)
        shards = _shards(specs, max_shard_bytes)
        weight_map = {}
        for number, shard in enumerate(shards, 1):
            name = "model.safetensors"
            if len(shards) > 1:
                name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            write_file(partial / name, [(spec.name, spec.dtype, spec.shape) for spec in shard], tensors)
            weight_map |= {spec.name: name for spec in shard}
        if len(shards) > 1:
            index = {"metadata": {"total_size": sum(spec.nbytes for spec in specs)}, "weight_map": weight_map}
            (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        _check_out(out)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _shards(specs: Iterable[TensorSpec], limit: int) -> list[list[TensorSpec]]:
    """Consecutive tensors in files of at most `limit` bytes."""
    shards: list[list[TensorSpec]] = [[]]
    held = 0
    for spec in specs:
        if shards[-1] and held + spec.nbytes > limit:
            shards.append([])
            held = 0
        shards[-1].append(spec)
        held += spec.nbytes
    return shards


def _set_config_dtype(path: Path, dtype: str) -> None:
    """Say the new dtype wherever the config said one: engines allocate by it."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for part in (config, config.get("text_config"), config.get("vision_config")):
        for key in ("dtype", "torch_dtype"):
            if isinstance(part, dict) and part.get(key) is not None:
                part[key] = dtype
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _check_out(out: Path) -> None:
    if out.is_dir() and any(out.iterdir()):
        raise CheckpointError(f"{out}: is not empty; an export needs a new or an empty folder")
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out}: is a file; an export needs a new or an empty folder")


if __name__ == "__main__":
    sys.exit(main())
