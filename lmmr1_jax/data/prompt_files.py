"""Rows of prompt files: JSON, JSONL and parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lmmr1_jax.data.faults import BAD_JSON, SkipPrompt
from lmmr1_jax.runtime.errors import UserError


def read_rows(path: str | Path) -> Iterator[tuple[int, dict[str, Any] | SkipPrompt]]:
    """Numbered rows of a prompt file; a row that is no JSON object comes as the fault it is.

    Rows of JSONL are lines, counted from 0; blank lines are counted but not given.

    Raises:
      UserError: the file is missing, of another kind, or broken as a whole.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such prompt file")
    readers = {".jsonl": _jsonl_rows, ".json": _json_rows, ".parquet": _parquet_rows}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: prompt files end in {', '.join(sorted(readers))}")
    try:
        for number, row in reader(path):
            if not isinstance(row, dict | SkipPrompt):
                row = SkipPrompt(BAD_JSON, f"a row must be an object, not {type(row).__name__}")
            yield number, row
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Any]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
                yield number, SkipPrompt(BAD_JSON, f"the line is not JSON: {error}")


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        rows = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: must hold a list of rows, not {type(rows).__name__}")
    yield from enumerate(rows)


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: parquet needs pyarrow: pip install 'lmmr1-jax[data]'") from None
    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                yield number, row
                number += 1
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not parquet: {' '.join(str(error).split())}") from None
