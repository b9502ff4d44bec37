"""What a person watches: a bar and what the step is doing on a terminal, a line a step anywhere else.

Within a step the display moves: the phase and how much of it is done, as the sampler, the rewards and the learner tell
it. Without a terminal that is a line whenever nothing has been said for half a minute.
"""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

# The last steps tell best how long the next ones take: completions grow or shrink as a policy learns.
_RECENT_STEPS = 20
QUIET_SECONDS = 30.0
"""Without a terminal a line comes after so long a silence."""

_UNITS = {
    "rollout": "sampling",
    "score": "completions scored",
    "learn": "micro-batches learned",
    "sync": "handing over the weights",
    "evaluate": "evaluating",
}
"""What a phase's count is of, in words."""

_SHOWN = (
    ("reward", "reward/mean", "{:.3f}"),
    ("accuracy", "reward/accuracy", "{:.3f}"),
    ("length", "completion/length", "{:.1f}"),
    ("KL", "kl", "{:.4f}"),
    ("tokens/s", "tokens_per_second", "{:,.0f}"),
)


class ProgressDisplay:
    """Shows a run's progress on `console`, stdout by default. Used as a context manager it gives the terminal its
    cursor back whatever happened; `phase` and `progress` may be called from any thread."""

    def __init__(self, total_steps: int, console: Console | None = None, *, quiet_seconds: float = QUIET_SECONDS):
        self._console = console or Console()
        self._total, self._quiet_seconds = total_steps, quiet_seconds
        self._done = 0
        self._times: collections.deque[float] = collections.deque(maxlen=_RECENT_STEPS + 1)
        self._figures = "waiting for the first step"
        self._phase, self._phase_began, self._counts = "", 0.0, (0, 0)
        self._last_said = time.monotonic()
        self._live: Live | None = None
        self._closed = threading.Event()
        self._watcher: threading.Thread | None = None

    def start(self, done: int = 0) -> None:
        """The run begins, or goes on behind `done` steps."""
        self._done = done
        self._times.append(time.monotonic())
        if self._console.is_terminal:
            columns = (TextColumn("steps"), BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, console=self._console, expand=True)
            self._task = self._bar.add_task("steps", total=self._total, completed=done)
            self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=2)
            self._live.start()
        else:
            self._watcher = threading.Thread(target=self._break_silence, name="console", daemon=True)
            self._watcher.start()

    def phase(self, name: str) -> None:
        """A phase of the step begins."""
        self._phase, self._phase_began, self._counts = name, time.monotonic(), (0, 0)

    def progress(self, done: int, total: int) -> None:
        """How much of the phase is done, of how much."""
        self._counts = (done, total)

    def step(self, step: int, record: dict[str, Any]) -> None:
        """A step has ended, with these figures."""
        self._done, self._phase = step, ""
        self._times.append(time.monotonic())
        self._figures = f"{figures(record)}  {duration(seconds_left(list(self._times), self._total - step))} left"
        if self._live:
            self._bar.update(self._task, completed=step)
        else:
            self.say(f"step {step}/{self._total}  {self._figures}")

    def evaluation(self, step: int, result: dict[str, Any]) -> None:
        """An evaluation has ended, with this result."""
        self._phase = ""
        self.say(
            f"evaluation at step {step}: accuracy {result['accuracy']:.3f}, format {result['format']:.3f}"
            f" on {result['prompts']} prompts"
        )

    def samples(self, step: int, records: list, rollouts: list) -> None:
        """Completions are too long for a console."""

    def say(self, text: str) -> None:
        """A line of its own; on a terminal it appears above the bar."""
        self._last_said = time.monotonic()
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        self._console.file.flush()

    def activity(self) -> str:
        """The phase under way and how far it is; empty between two phases."""
        phase, (done, total) = self._phase, self._counts
        if not phase:
            return ""
        words = _UNITS.get(phase, phase)
        count = f" {done}/{total}" if total else ""
        return f"{phase}: {words}{count}, {duration(time.monotonic() - self._phase_began)}"

    def close(self) -> None:
        """Ends the display; it may be closed twice."""
        self._closed.set()
        if self._live:
            self._live.stop()
            self._live = None
        if self._watcher:
            self._watcher.join()
            self._watcher = None

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _render(self) -> Group:
        lines = [Text(self._figures)]
        if activity := self.activity():
            lines.append(Text(activity))
        return Group(self._bar, *lines)

    def _break_silence(self) -> None:
        while not self._closed.wait(max(0.0, self._last_said + self._quiet_seconds - time.monotonic())):
            if time.monotonic() - self._last_said < self._quiet_seconds:
                continue
            if activity := self.activity():
                self.say(f"step {min(self._done + 1, self._total)}/{self._total}  {activity}")
            else:
                self._last_said = time.monotonic()


def seconds_left(times: Sequence[float], steps_left: int) -> float | None:
    """Steps left times the mean length of the last ones, None when none has ended.

    Args:
      times: seconds at the start of the run and at the end of each step, or the last `_RECENT_STEPS + 1` of these. The
        first step holds the compilations and is left out as soon as another has ended.
    """
    if len(times) < 2:
        return None
    if 2 < len(times) <= _RECENT_STEPS:
        times = times[1:]
    return (times[-1] - times[0]) / (len(times) - 1) * max(0, steps_left)


def figures(record: dict[str, Any]) -> str:
    """The figures that a person follows, those of them that were measured."""
    shown = [f"{label} {form.format(record[name])}" for label, name, form in _SHOWN if record.get(name) is not None]
    return "  ".join(shown)


def duration(seconds: float | None) -> str:
    """`1:02:03`, `2:03`, or `?` when nobody knows."""
    if seconds is None:
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
