"""What the bridge reads of a run's folder: its checkpoints' parameters and the source model's side files.

    RUN/model/                     config, tokenizer, processor, chat template, source_dtypes.json
    RUN/checkpoints/STEP/state/    an Orbax PyTree {"params": ..., ...}
"""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import jax
import numpy as np

from weights_bridge.errors import CheckpointError
from weights_bridge.load import source_dtypes

SOURCE_DTYPES_FILE = "source_dtypes.json"
_SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*processor_config.json",
    "chat_template*",
    "LICENSE*",
    "NOTICE*",
)


def copy_side_files(source: str | Path, target: str | Path) -> None:
    """Copy all of a Hugging Face folder but its weights, and note the weights' names and dtypes.

    With them a run's checkpoint can be exported when its source is no longer at hand.

    Args:
      source: a Hugging Face folder, or the `model` folder of a run.
      target: made when it is not there; files in it are replaced.

    Raises:
      CheckpointError: when the source is not a whole checkpoint.
    """
    dtypes = stored_dtypes(source)
    target = Path(target)
    copy_files(source, target)
    # Written last and by renaming: its presence says that the folder is whole.
    beside = target / (SOURCE_DTYPES_FILE + ".tmp")
    beside.write_text(json.dumps(dtypes, indent=1) + "\n", encoding="utf-8")
    beside.replace(target / SOURCE_DTYPES_FILE)


def copy_files(source: str | Path, target: str | Path) -> None:
    """Copy config, tokenizer, processor, chat templates and licences, as they are."""
    source, target = Path(source), Path(target)
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        if not any(fnmatch(path.name, pattern) for pattern in _SIDE_FILES):
            continue
        if path.is_dir():
            shutil.copytree(path, target / path.name, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, target / path.name)


def stored_dtypes(folder: str | Path) -> dict[str, str]:
    """Names and dtypes of the source's tensors, from the note of `copy_side_files` or from the weights themselves."""
    note = Path(folder) / SOURCE_DTYPES_FILE
    if not note.is_file():
        return source_dtypes(folder)
    try:
        return dict(json.loads(note.read_text(encoding="utf-8")))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{note}: cannot be read as JSON ({error})") from error


def step_folders(folder: str | Path) -> dict[int, Path]:
    """The whole checkpoints of a run (its folder, or its `checkpoints`), by step, oldest first."""
    folder = Path(folder)
    if (folder / "checkpoints").is_dir():
        folder = folder / "checkpoints"
    if not folder.is_dir():
        return {}
    found = {int(path.name): path for path in folder.iterdir() if path.name.isdecimal() and is_step_folder(path)}
    return dict(sorted(found.items()))


def is_step_folder(folder: str | Path) -> bool:
    """Whether a folder is a whole checkpoint: Orbax writes under another name and renames it when it is complete."""
    folder = Path(folder)
    return "orbax-checkpoint-tmp" not in folder.name and (folder / "state" / "_METADATA").is_file()


def newest_step(run: str | Path) -> Path | None:
    """The folder of a run's newest whole checkpoint, None when there is none."""
    folders = step_folders(run)
    return folders[max(folders)] if folders else None


def read_orbax_params(step_folder: str | Path) -> dict[str, Any]:
    """A checkpoint's parameters, and nothing else of it, as NumPy arrays: no matter what devices wrote them.

    Raises:
      CheckpointError: when the folder is no checkpoint or cannot be read.
    """
    import orbax.checkpoint as ocp

    state = Path(step_folder).resolve() / "state"
    if not is_step_folder(step_folder):
        raise CheckpointError(f"{step_folder}: is not a whole checkpoint of a run")
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            stored = checkpointer.metadata(state).item_metadata
            if stored is None:
                raise ValueError("its list of arrays is missing or damaged")
            metadata = stored.tree["params"]
            wanted = {"params": jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), metadata)}
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
            restore = ocp.args.PyTreeRestore(item=wanted, restore_args=as_numpy, partial_restore=True)
            return checkpointer.restore(state, args=restore)["params"]
    except Exception as error:  # Orbax and TensorStore raise whatever their storage raised
        # TensorStore ends its message with the whole specification of the array.
        reason = str(error).partition("[tensorstore_spec")[0].strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{step_folder}: its parameters cannot be read ({reason})") from error
