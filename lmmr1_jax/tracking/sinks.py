"""Where a run's figures go: files of JSON lines, TensorBoard, Weights & Biases. The console is in `console`.

A sink has `step`, `evaluation`, `samples` and `close`, and may raise: the tracker sees to it that the run goes on.
"""

from __future__ import annotations

import importlib.util
import json
import secrets
from pathlib import Path
from typing import Any

from lmmr1_jax.runtime.errors import UserError
from lmmr1_jax.tracking.samples import sample_text
from lmmr1_jax.tracking.step_files import jsonable, truncate_steps
from lmmr1_jax.types.records import Rollout

# Images are shown, not kept: event files would grow by 3 MB with every large one.
_SHOWN_SIDE = 512

Record = dict[str, Any]


class JsonLinesSink:
    """`metrics.jsonl`, `evaluations.jsonl` and `samples.jsonl`, cut back to the resumed step, each line flushed."""

    def __init__(self, folder: Path, resume_step: int | None):
        self._folder = folder
        for name in ("metrics", "evaluations", "samples"):
            truncate_steps(folder / f"{name}.jsonl", resume_step)

    def step(self, step: int, record: Record) -> None:
        self._append("metrics", [record])

    def evaluation(self, step: int, result: Record) -> None:
        self._append("evaluations", [{"step": step, **result}])

    def samples(self, step: int, records: list[Record], rollouts: list[Rollout]) -> None:
        self._append("samples", records)

    def close(self) -> None:
        """Nothing is held open between two lines."""

    def _append(self, name: str, records: list[Record]) -> None:
        text = "".join(json.dumps(jsonable(r), ensure_ascii=False, allow_nan=False) + "\n" for r in records)
        with (self._folder / f"{name}.jsonl").open("a", encoding="utf-8") as file:
            file.write(text)


class TensorBoardSink:
    """Event files in `tb/`: every number as a scalar; samples with their images every so many steps."""

    def __init__(self, folder: Path, resume_step: int | None, images_every: int):
        from tensorboardX import SummaryWriter  # slow to import, and not needed with tracking.tensorboard off

        # What an earlier life of the run wrote from `purge_step` on is lost and hidden.
        purge_step = 0 if resume_step is None else resume_step + 1
        # The suffix gives two lives that start within a second two files, which are read in the order of their names.
        suffix = f".from-{resume_step or 0:08}"
        self._writer = SummaryWriter(str(folder / "tb"), purge_step=purge_step, flush_secs=10, filename_suffix=suffix)
        self._images_every = images_every

    def step(self, step: int, record: Record) -> None:
        for name, value in jsonable(record).items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)

    def evaluation(self, step: int, result: Record) -> None:
        for name, value in jsonable(result).items():
            if isinstance(value, int | float):
                self._writer.add_scalar(f"evaluation/{name}", value, step)

    def samples(self, step: int, records: list[Record], rollouts: list[Rollout]) -> None:
        if not self._images_every or (step != 1 and step % self._images_every):
            return
        for number, (record, rollout) in enumerate(zip(records, rollouts, strict=True)):
            self._writer.add_text(f"samples/{number}", sample_text(record), step)
            for index, image in enumerate(rollout.encoded.images):
                self._writer.add_image(
                    f"samples/{number}/image{index}", _shown(image.pixels), step, dataformats="HWC"
                )

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """Weights & Biases, one run there for one folder here: its id is kept in `wandb.id` for resuming."""

    def __init__(self, folder: Path, project: str, config: Record):
        if importlib.util.find_spec("wandb") is None:
            raise UserError("tracking.wandb needs the package wandb: pip install 'lmmr1-jax[wandb]'")
        import wandb

        id_file = folder / "wandb.id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        self._run = wandb.init(
            project=project, dir=str(folder), name=folder.name, id=id_file.read_text(), resume="allow", config=config
        )

    def step(self, step: int, record: Record) -> None:
        self._run.log({name: value for name, value in jsonable(record).items() if name != "step"}, step=step)

    def evaluation(self, step: int, result: Record) -> None:
        self._run.log({f"evaluation/{name}": value for name, value in jsonable(result).items()}, step=step)

    def samples(self, step: int, records: list[Record], rollouts: list[Rollout]) -> None:
        """Texts and images stay in the run's folder and in TensorBoard."""

    def close(self) -> None:
        self._run.finish()


def _shown(pixels):
    """uint8 `[height, width, 3]`, no side longer than what a browser shows."""
    height, width = pixels.shape[:2]
    step = -(-max(height, width) // _SHOWN_SIDE)
    return pixels[::step, ::step]
