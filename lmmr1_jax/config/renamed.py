"""Names of earlier versions and what they are called now, so that an old command or config file is answered by it."""

from __future__ import annotations

from pathlib import Path

FIELDS = {
    "data.message_key": "data.prompt_key",
    "data.picture_root": "data.image_root",
    "rollout.update": "rollout.weight_update",
    "vllm.engines": "vllm.num_engines",
    "vllm.max_sequences": "vllm.max_num_seqs",
    "vllm.memory_share": "vllm.gpu_memory_utilization",
    "vllm.eager": "vllm.enforce_eager",
    "vllm.pictures": "vllm.max_images",
    "learner.picture_rows": "learner.image_rows",
    "tracking.pictures_every": "tracking.images_every",
}
FLAGS = {
    "--message-key": "--prompt-key",
    "--picture-root": "--image-root",
    "--pictures": "--max-images",
    "--max-sequences": "--max-num-seqs",
}
"""Flags of generate, score and evaluate."""

_VALUES = {"rollout.update": " (between is now drain, within is in-flight)"}


def field_now(name: str) -> str:
    """What the field of the dotted name `name` is called now, without its group; empty where it was not renamed."""
    return FIELDS[name].rpartition(".")[2] if name in FIELDS else ""


def flag_now(flag: str) -> str:
    """`field_now` for a flag of the training command, as a whole flag."""
    name = flag.removeprefix("--").replace("-", "_")
    return "--" + FIELDS[name].replace("_", "-") if name in FIELDS else ""


def values_now(name: str) -> str:
    """The end of a sentence about a renamed field whose values have other names too."""
    return _VALUES.get(name.removeprefix("--").replace("-", "_"), "")


def config_file_now(path: str | Path) -> str:
    """Where a config file that is not there stands now: the demonstrations have a folder of their own."""
    path = Path(path)
    moved = path.parent / "demo" / path.name
    return str(moved) if moved.is_file() else ""
