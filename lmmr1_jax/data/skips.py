"""What was skipped, so that nothing is dropped silently: counts in memory and a line each in `skipped.jsonl`."""

from __future__ import annotations

import collections
import json
import os
import threading
from pathlib import Path
from typing import Any


class SkipLog:
    """Counts skipped rows by reason and appends `{"file", "row", "reason", "detail"}` to a file.

    A resumed run opens it with `keep=True`, reads its prompts (which logs the rows skipped at load a second time) and
    then calls `restore`, which cuts the file back to what it was at the checkpoint.

    Attributes:
      counts: skipped rows per reason.
      records: the records themselves, kept only where there is no file.
    """

    def __init__(self, path: str | os.PathLike | None = None, *, keep: bool = False):
        self.counts: collections.Counter[str] = collections.Counter()
        self.records: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        self._file = None
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: a line is with the operating system before the next row is read, whatever kills the run.
            self._file = open(path, "ab", buffering=0)
            if not keep:
                self._file.truncate(0)

    @property
    def total(self) -> int:
        """Rows skipped so far."""
        return sum(self.counts.values())

    def add(self, file: str, row: int, reason: str, detail: str) -> None:
        """Counts a skipped row and writes it down."""
        record = {"file": str(file), "row": int(row), "reason": reason, "detail": detail}
        with self._lock:
            self.counts[reason] += 1
            if self._file is None:
                self.records.append(record)
            else:
                self._file.write((json.dumps(record) + "\n").encode("utf-8"))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint stores: counts, and the file's length in bytes (0 without a file)."""
        with self._lock:
            return {"counts": dict(self.counts), "offset": self._size()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Back to `state`: the counts, and the file cut to its length of then."""
        with self._lock:
            self.counts = collections.Counter(state["counts"])
            if self._file is not None:
                # Never longer: a file that lost its end must not be filled up with zeros.
                self._file.truncate(min(int(state["offset"]), self._size()))

    def close(self) -> None:
        """Closes the file; counts stay."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size if self._file is not None else 0
