"""The step files of a run: lines of strict JSON, cut back to the step that a run resumes from."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


def truncate_steps(path: str | Path, last_step: int | None) -> None:
    """Cuts a file of JSON lines after the last whole line whose "step" is at most `last_step`; None cuts everything.

    Lines stand in the order of their steps, so that one cut is enough, and a cut is never half done. A line that was
    being written when the run was killed goes as well.
    """
    path = Path(path)
    if not path.exists():
        return
    keep = 0
    if last_step is not None:
        with path.open("rb") as file:
            for line in file:
                step = _step_of(line)
                if step is None or step > last_step:
                    break
                keep += len(line)
    os.truncate(path, keep)


def read_lines(path: str | Path) -> Iterator[dict[str, Any]]:
    """The records of a file of JSON lines; none when there is no such file."""
    if Path(path).exists():
        with open(path, encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)


def jsonable(value: Any) -> Any:
    """The same value in JSON's own types: arrays of one number become that number; NaN and infinities become null."""
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Path):
        return str(value)
    if not isinstance(value, float):
        array = np.asarray(value)
        value = array.item() if array.size == 1 else array.tolist()
        return jsonable(value)
    return value if math.isfinite(value) else None


def _step_of(line: bytes) -> int | None:
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None


def write_json(path: Path, content: object) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never half of it."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(beside, path)
