"""Where a step's time goes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator


class Stopwatch:
    """Seconds by phase; `clock("rollout")` is a context that adds to the phase `rollout`.

    Attributes:
      seconds: of every phase so far.
    """

    def __init__(self, on_phase: Callable[[str], None] = lambda phase: None):
        """`on_phase` is called with a phase's name when it begins."""
        self.seconds: dict[str, float] = {}
        self._on_phase = on_phase

    @property
    def total(self) -> float:
        """All phases together."""
        return sum(self.seconds.values())

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._on_phase(phase)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
