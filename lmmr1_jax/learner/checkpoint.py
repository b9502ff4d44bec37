"""Checkpoints with Orbax: written in the background, whole or not there, restored onto whatever devices there are.

On disk, `<run>/checkpoints/<STEP>/`: `state/` is the train state as a nested dict with string keys (`as_dict`), and
`extras/` is JSON, what the host has to remember. Orbax writes into a folder of another name and renames it when all is
there, so a run that is killed leaves the last whole checkpoint.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from lmmr1_jax.learner.state import TrainState, as_dict, from_dict
from lmmr1_jax.runtime.errors import UserError

_log = logging.getLogger(__name__)

_UNFINISHED = ".orbax-checkpoint-tmp"


class Checkpoints:
    """The checkpoints of a run: the newest `keep`, and the best by the score that `save` was given."""

    def __init__(self, folder: str | Path, *, keep: int):
        self.folder = Path(folder).absolute()
        self.keep = keep
        self._writer = ocp.AsyncCheckpointer(_handler())
        self._scores: dict[int, float | None] = {}
        self._damaged: set[int] = set()
        for leftover in _unfinished(self.folder):
            _log.info("removing %s, the leftover of a run that was killed while writing", leftover)
            shutil.rmtree(leftover)

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints on disk, ascending."""
        return whole_steps(self.folder)

    def save(self, step: int, state: TrainState, extras: dict[str, Any], *, score: float | None = None) -> None:
        """Start writing; returns when the state may be donated.

        Args:
          step: names the folder; a checkpoint that is there already is replaced.
          state: the learner's state.
          extras: what else a resumed run needs; JSON-able.
          score: the greater the better (evaluated accuracy); None when nothing was evaluated at this step.
        """
        self.wait()
        self.folder.mkdir(parents=True, exist_ok=True)
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(as_dict(state)),
            extras=ocp.args.JsonSave({"score": score, "extras": extras}),
        )
        self._writer.save(self.folder / str(step), args=items, force=True)
        self._scores.pop(step, None)
        self._damaged.discard(step)

    def save_once(self, step: int, state: TrainState, extras: dict[str, Any]) -> None:
        """Sees to it that this step has a whole checkpoint: waits for one that is being written, writes none that is
        there already, and returns when it is whole on disk."""
        self.wait()
        if step not in self.steps():
            self.save(step, state, extras)
            self.wait()

    def wait(self) -> None:
        """Return when the last checkpoint is whole on disk; then remove those that are not to be kept.

        Raises what the writing in the background raised.
        """
        self._writer.wait_until_finished()
        # A damaged one takes no place among those to keep: it would push out the one that the run goes on from.
        steps = [step for step in self.steps() if step not in self._damaged]
        kept = set(steps[len(steps) - self.keep :]) if self.keep > 0 else set(steps)
        scored = [step for step in steps if self._score(step) is not None]
        if scored:
            kept.add(max(scored, key=lambda step: (self._score(step), step)))
        for step in steps:
            if step not in kept:
                _remove(self.folder / str(step))

    def close(self) -> None:
        """Wait for the last checkpoint and end the background threads."""
        self.wait()
        self._writer.close()

    def restore_newest(self, abstract: TrainState) -> tuple[int, TrainState, dict[str, Any]] | None:
        """Step, state and extras of the newest whole checkpoint; None where there is none.

        A checkpoint that can't be read is passed over, with a warning, for the one before it.

        Args:
          abstract: a TrainState of `jax.ShapeDtypeStruct` with the shardings to restore onto; the number of devices
            may be another one than when it was written.

        Raises:
          UserError: there are checkpoints and none of them can be read.
        """
        faults: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                state, extras = restore(self.folder / str(step), abstract)
            except Exception as error:  # Orbax, TensorStore and json each have their own
                faults[step] = _first_line(error)
                self._damaged.add(step)
                continue
            for damaged, reason in faults.items():
                _log.warning("checkpoint %s can't be read: %s", self.folder / str(damaged), reason)
            return step, state, extras
        if faults:
            reason = faults[max(faults)]
            raise UserError(f"{self.folder}: none of the checkpoints {sorted(faults)} can be read: {reason}")
        return None

    def _score(self, step: int) -> float | None:
        if step not in self._scores:
            self._scores[step] = _read_score(self.folder / str(step))
        return self._scores[step]


def whole_steps(folder: str | Path) -> list[int]:
    """Steps under `folder` whose checkpoints were finished, ascending; what is being written has no such name."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    names = (path.name for path in folder.iterdir() if (path / "state").is_dir() and (path / "extras").is_dir())
    return sorted(int(name) for name in names if name.isdecimal())


def restore(folder: str | Path, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """State and extras of one checkpoint, bit for bit, with the dtypes and shardings of `abstract`.

    Raises ValueError when the tree on disk is another one than `abstract`'s.
    """
    folder = Path(folder).absolute()
    tree = as_dict(abstract)
    arguments = jax.tree.map(
        lambda leaf: ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype), tree
    )
    _check_shapes(folder / "state", tree)
    with ocp.Checkpointer(_handler()) as reader:
        items = reader.restore(
            folder,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeRestore(item=tree, restore_args=arguments), extras=ocp.args.JsonRestore()
            ),
        )
    return from_dict(items.state, abstract), items.extras["extras"]


def _check_shapes(folder: Path, tree: dict[str, Any]) -> None:
    # Looked up before anything is read: Orbax would cut or pad an array of another shape to fit.
    # Not through a Checkpointer, which warns that `state/` has no metadata of a checkpoint's root, and hides errors.
    try:
        stored = ocp.PyTreeCheckpointHandler().metadata(folder).tree
    except Exception as error:
        raise ValueError(f"its list of parameters is missing or damaged ({_first_line(error)})") from error
    stored = jax.tree.map(lambda leaf: tuple(leaf.shape), stored)
    wanted = jax.tree.map(lambda leaf: tuple(leaf.shape), tree)
    if stored != wanted:
        raise ValueError("its parameters have other names or shapes than the model's")


def _handler() -> ocp.CompositeCheckpointHandler:
    # Left to itself, Orbax has the copies of an array on several devices write a part each, and compiles a program for
    # every part in the middle of the run.
    whole = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, whole))
    # Trained float32 numbers hardly compress; trying costs more time than the disk.
    state = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)
    return ocp.CompositeCheckpointHandler(state=state, extras=ocp.JsonCheckpointHandler())


def _read_score(folder: Path) -> float | None:
    try:
        with ocp.Checkpointer(_handler()) as reader:
            return reader.restore(folder, args=ocp.args.Composite(extras=ocp.args.JsonRestore())).extras["score"]
    except Exception as error:  # a damaged checkpoint must not end the run that writes the next one
        _log.warning("the score of checkpoint %s can't be read: %s", folder, _first_line(error))
        return None


def _remove(folder: Path) -> None:
    # Renamed first: a run that is killed while removing must not leave a part that looks like a whole.
    doomed = folder.with_name(f"{folder.name}{_UNFINISHED}-removed")
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _unfinished(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if path.is_dir() and _UNFINISHED in path.name]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
