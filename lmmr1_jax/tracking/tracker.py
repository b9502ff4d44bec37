"""One object that a run tells what happened; it writes the run's folder and shows the progress.

tracker = Tracker(run_dir, config, resume_step, total_steps, decode=processor.decode)
tracker.evaluation(0, {"accuracy": 0.41, "format": 0.99, "prompts": 1024, "seconds": 9.1})
tracker.log(1, {"loss/policy": ..., "time/rollout": ...}, rollouts)
tracker.finish(skipped={"broken_image": 2})
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lmmr1_jax.config.schema import TrainConfig
from lmmr1_jax.runtime.compilation import CompilationCounter
from lmmr1_jax.runtime.errors import UserError
from lmmr1_jax.runtime.versions import versions
from lmmr1_jax.tracking.console import ProgressDisplay
from lmmr1_jax.tracking.rollout_metrics import rollout_metrics
from lmmr1_jax.tracking.samples import sample_record
from lmmr1_jax.tracking.sinks import JsonLinesSink, TensorBoardSink, WandbSink
from lmmr1_jax.tracking.step_files import jsonable, read_lines, write_json
from lmmr1_jax.types.records import Rollout

PHASES = ("rollout", "score", "learn", "sync")


class Tracker:
    """Keeps a run's figures: the step files, TensorBoard, W&B, the console and `summary.json`.

    A sink that fails (a full disk, a lost connection) costs a warning the first time and a count, never the run. Used
    as a context manager it closes itself, which gives the terminal its cursor back whatever happened.

    Attributes:
      evaluations: every evaluation of the run by its step, those before a resume included.
      failures: how many times a sink failed.
    """

    def __init__(
        self,
        run_dir: str | Path,
        config: TrainConfig,
        resume_step: int | None,
        total_steps: int,
        *,
        decode: Callable[[np.ndarray], str],
        display: ProgressDisplay | None = None,
    ):
        """Starts the clock and cuts the step files to `resume_step`; None means that the run starts anew.

        Raises:
          UserError: W&B is asked for and not installed.
        """
        self._folder = Path(run_dir)
        self._tracking = config.tracking
        self._decode = decode
        self._compilations = CompilationCounter()
        self._steps_logged = 0
        self.failures = 0
        self._warned: set[str] = set()
        self._closed = False

        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / "summary.json").unlink(missing_ok=True)

        self._display = display or ProgressDisplay(total_steps)
        self._display.start(resume_step or 0)
        self._sinks: list[Any] = [JsonLinesSink(self._folder, resume_step), self._display]
        if config.tracking.tensorboard:
            self._add(lambda: TensorBoardSink(self._folder, resume_step, config.tracking.images_every))
        if config.tracking.wandb:
            self._add(lambda: WandbSink(self._folder, config.tracking.wandb_project, dataclasses.asdict(config)))

        self._last_step = resume_step or 0
        self._seconds = dict.fromkeys(PHASES, 0.0)
        earlier = 0.0
        for record in read_lines(self._folder / "metrics.jsonl"):
            self._count_seconds(record)
            earlier = record.get("time/elapsed") or earlier
        self.evaluations = {result.pop("step"): result for result in read_lines(self._folder / "evaluations.jsonl")}
        self._started = time.monotonic() - earlier

    def log(self, step: int, metrics: Mapping[str, Any], rollouts: Sequence[Rollout] = ()) -> dict[str, Any]:
        """A finished step, counted from 1: its figures, to which those of the rollouts are added, and its samples.

        Returns:
          The line as `metrics.jsonl` has it.
        """
        record = {
            "step": step,
            **rollout_metrics(rollouts),
            **metrics,
            "time/elapsed": time.monotonic() - self._started,
            "compiled_programs": self.compiled_programs,
            "tracking/failures": self.failures,
        }
        record = jsonable(record)
        self._last_step = step
        self._count_seconds(record)
        self._tell("step", step, record)
        shown = list(rollouts[: self._tracking.samples])
        if shown:
            self._tell("samples", step, [sample_record(step, rollout, self._decode) for rollout in shown], shown)
        if not self._steps_logged:
            self._compilations.restart()
        self._steps_logged += 1
        return record

    def evaluation(self, step: int, result: Mapping[str, Any]) -> None:
        """An evaluation of the weights after `step` updates: "accuracy" and "format" (fractions), "prompts" (a count),
        "seconds" that it took, and whatever else is worth keeping. Telling one again replaces it."""
        result = jsonable(dict(result))
        self.evaluations[step] = result
        self._tell("evaluation", step, result)

    @property
    def compiled_programs(self) -> int:
        """Backend compilations since the first step that this process logged; 0 until then."""
        return self._compilations.count if self._steps_logged else 0

    @property
    def compiled_names(self) -> list[str]:
        """The functions behind `compiled_programs`, to be found and mended."""
        return list(self._compilations.names) if self._steps_logged else []

    def say(self, text: str) -> None:
        """A line on the console that leaves the progress display in order."""
        self._display.say(text)

    def warn(self, text: str) -> None:
        self._display.say(f"warning: {text}")

    def finish(self, *, skipped: Mapping[str, int], **more: Any) -> dict[str, Any]:
        """Ends a run that reached its last step: closes the sinks, then writes `summary.json`, the last file of a run.

        Args:
          skipped: rows skipped in the whole run by reason.
          more: further entries of the summary.
        """
        compiled = self.compiled_programs
        self.close()
        steps = sorted(self.evaluations)
        evaluated = [result.get("seconds") or 0.0 for result in self.evaluations.values()]
        summary = {
            "steps": self._last_step,
            "seconds": {"total": time.monotonic() - self._started, **self._seconds, "evaluate": sum(evaluated)},
            "evaluation": {
                "before": self.evaluations[steps[0]] if steps and steps[0] == 0 else None,
                "after": self.evaluations[steps[-1]] if steps and steps[-1] > 0 else None,
            },
            "compiled_programs": compiled,
            "skipped": sum(skipped.values()),
            "skipped_by_reason": dict(skipped),
            "versions": versions(),
            "devices": [f"{device.platform}:{device.id} {device.device_kind}" for device in jax.devices()],
            **more,
        }
        summary = jsonable(summary)
        write_json(self._folder / "summary.json", summary)
        return summary

    def close(self) -> None:
        """Ends the display and flushes the sinks; a run that stops early ends with this and has no summary."""
        if not self._closed:
            self._closed = True
            self._tell("close")
            self._compilations.close()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _count_seconds(self, record: Mapping[str, Any]) -> None:
        for phase in PHASES:
            self._seconds[phase] += record.get(f"time/{phase}") or 0.0

    def _add(self, make: Callable[[], Any]) -> None:
        try:
            self._sinks.append(make())
        except UserError:
            raise
        except Exception as error:  # W&B without a network, a `tb` that is a file: no figure is worth a run
            self._failed("starting a sink", error)

    def _tell(self, what: str, *arguments: Any) -> None:
        for sink in self._sinks:
            try:
                getattr(sink, what)(*arguments)
            except Exception as error:
                self._failed(type(sink).__name__, error)

    def _failed(self, name: str, error: Exception) -> None:
        self.failures += 1
        if name not in self._warned:
            self._warned.add(name)
            text = " ".join(str(error).split())
            warnings.warn(f"tracking: {name} failed ({type(error).__name__}: {text}); the run goes on", stacklevel=2)
