"""A run's folder: refused when it holds something else, written so that a killed run can go on in it."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

from lmmr1_jax.config.schema import TrainConfig
from lmmr1_jax.runtime.errors import UserError
from lmmr1_jax.runtime.stop_signal import StopRequested
from lmmr1_jax.tracking.step_files import write_json
from weights_bridge.errors import BridgeError
from weights_bridge.run_checkpoint import copy_side_files

WORK = ("evaluations.jsonl", "metrics.jsonl")
"""Files of which a run that has done anything has one, or else a checkpoint: it may be stopped in its first step."""


@contextlib.contextmanager
def open_run_folder(config: TrainConfig) -> Iterator[Path]:
    """The run's folder.

    Where wrong input or a signal ends the run before it has done anything, the folder is left as empty as it was found,
    so that the mended command, or the same again, is not refused.

    Raises:
      UserError: the folder is not empty and `run.resume` is not set, or it cannot be made.
    """
    folder = Path(config.run.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        occupied = any(folder.iterdir())
    except OSError as error:
        raise UserError(f"--run.dir {folder}: {error.strerror or error}; name a folder that can be written") from error
    if occupied and not config.run.resume:
        raise UserError(f"--run.dir {folder} is not empty: choose another folder, or --resume to go on with that run")
    (folder / "checkpoints").mkdir(exist_ok=True)
    try:
        yield folder
    except (UserError, BridgeError, StopRequested):
        work = [*(folder / "checkpoints").glob("[0-9]*"), *filter(Path.exists, map(folder.joinpath, WORK))]
        if not occupied and not work:
            shutil.rmtree(folder)
        raise


def describe_run(folder: Path, config: TrainConfig, source: Path) -> None:
    """Writes `config.json`, every field resolved, and `model/`: all of the source model's folder but its weights.

    Only once a run has taken up its checkpoint: a resumption with the wrong model or data must not describe the
    checkpoints of another run by its own config.
    """
    write_json(folder / "config.json", dataclasses.asdict(config))
    copy_side_files(source, folder / "model")


