"""A run's folder: refused when it holds something else, written so that a killed run can go on in it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from lmmr1_jax.config.schema import TrainConfig
from lmmr1_jax.runtime.errors import UserError
from lmmr1_jax.runtime.stop_signal import StopRequested
from lmmr1_jax.tracking.step_files import write_json
from weights_bridge.errors import BridgeError
from weights_bridge.run_checkpoint import copy_side_files

LAYOUT = 2
"""The number of what a run leaves: names in `config.json`, and the tree of its checkpoints' state. It rises when a
folder of the version before can't be resumed any more; 1 stands in no file."""
WORK = ("evaluations.jsonl", "metrics.jsonl")
"""Files of which a run that has done anything has one, or else a checkpoint: it may be stopped in its first step."""


@contextlib.contextmanager
def open_run_folder(config: TrainConfig) -> Iterator[Path]:
    """The run's folder.

    Where wrong input or a signal ends the run before it has done anything, the folder is left as empty as it was found,
    so that the mended command, or the same again, is not refused.

    Raises:
      UserError: the folder is not empty and `run.resume` is not set, it cannot be made, or another version's run, which
        this one cannot resume, has left checkpoints in it.
    """
    folder = Path(config.run.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        occupied = any(folder.iterdir())
    except OSError as error:
        raise UserError(f"--run.dir {folder}: {error.strerror or error}; name a folder that can be written") from error
    if occupied and not config.run.resume:
        raise UserError(f"--run.dir {folder} is not empty: choose another folder, or --resume to go on with that run")
    if occupied:
        _check_layout(folder)
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
    write_json(folder / "config.json", {"layout": LAYOUT} | dataclasses.asdict(config))
    copy_side_files(source, folder / "model")


def _check_layout(folder: Path) -> None:
    described = folder / "config.json"
    if not described.is_file() or not any((folder / "checkpoints").glob("[0-9]*")):
        return
    try:
        layout = json.loads(described.read_text(encoding="utf-8")).get("layout", 1)
    except (ValueError, AttributeError):  # half a file says nothing; the checkpoints will say whether they can be read
        return
    if layout != LAYOUT:
        raise UserError(
            f"--run.dir {folder} has a run of layout {layout}, and this version resumes layout {LAYOUT}: train it to "
            f"its end with the version that wrote it; python -m weights_bridge.export --checkpoint {folder} exports it"
        )


