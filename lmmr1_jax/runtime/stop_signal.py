"""SIGTERM and Ctrl-C end a run resumably: the step under way is given up or finished, then a checkpoint is written."""

from __future__ import annotations

import signal
from types import FrameType


class StopRequested(Exception):
    """The run was asked to end; raised between the phases of a step, never inside the learner's update."""


class StopSignal:
    """Listens for SIGTERM and SIGINT while used as a context manager; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raises:
        StopRequested: a signal has come since the context was entered.
        """
        if self.received:
            raise StopRequested(self.received)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
