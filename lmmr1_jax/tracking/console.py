"""What a person watches: a bar with the last step's figures on a terminal, a line a step anywhere else."""

from __future__ import annotations

import collections
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

# The last steps tell best how long the next ones take: completions grow or shrink as a policy learns.
_RECENT_STEPS = 20

_SHOWN = (
    ("reward", "reward/mean", "{:.3f}"),
    ("accuracy", "reward/accuracy", "{:.3f}"),
    ("length", "completion/length", "{:.1f}"),
    ("KL", "kl", "{:.4f}"),
    ("tokens/s", "tokens_per_second", "{:,.0f}"),
)


class ProgressDisplay:
    """Shows a run's progress on `console`, stdout by default; ends with `close`."""

    def __init__(self, total_steps: int, done: int = 0, console: Console | None = None):
        self._console = console or Console()
        self._total = total_steps
        self._times = collections.deque([time.monotonic()], maxlen=_RECENT_STEPS + 1)
        self._figures = "waiting for the first step"
        self._live = None
        if self._console.is_terminal:
            columns = (TextColumn("steps"), BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, console=self._console, expand=True)
            self._task = self._bar.add_task("steps", total=total_steps, completed=done)
            self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=2)
            self._live.start()

    def step(self, step: int, record: dict[str, Any]) -> None:
        self._times.append(time.monotonic())
        self._figures = f"{figures(record)}  {duration(seconds_left(list(self._times), self._total - step))} left"
        if self._live:
            self._bar.update(self._task, completed=step)
        else:
            self.say(f"step {step}/{self._total}  {self._figures}")

    def evaluation(self, step: int, result: dict[str, Any]) -> None:
        self.say(
            f"evaluation at step {step}: accuracy {result['accuracy']:.3f}, format {result['format']:.3f}"
            f" on {result['prompts']} prompts"
        )

    def samples(self, step: int, records: list, rollouts: list) -> None:
        """Completions are too long for a console."""

    def say(self, text: str) -> None:
        """A line of its own; on a terminal it appears above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        self._console.file.flush()

    def close(self) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    def _render(self) -> Group:
        return Group(self._bar, Text(self._figures))


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
    """The figures that a person follows, those of them that the record has."""
    shown = [f"{label} {form.format(record[name])}" for label, name, form in _SHOWN if record.get(name) is not None]
    return "  ".join(shown)


def duration(seconds: float | None) -> str:
    """`1:02:03`, `2:03`, or `?` when nobody knows."""
    if seconds is None:
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
