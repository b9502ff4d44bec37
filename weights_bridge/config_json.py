"""The one reader of a checkpoint's `config.json`.

Two layouts are in use: the hub's checkpoints keep the text fields at the top level with `rope_theta` and
`rope_scaling`; transformers 5 writes a `text_config` with `rope_parameters`. Both are read; what the models can't
compute is refused by name. How a family's fields are read stands in its file under `families/`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weights_bridge.architecture import Architecture
from weights_bridge.errors import CheckpointError
from weights_bridge.families.registry import family_of


def read_architecture(folder: str | Path) -> Architecture:
    """Reads `config.json` of a Hugging Face folder.

    Raises:
      CheckpointError: the file is missing, no JSON, lacks a field, or asks for something unsupported; one line that
        names the file.
    """
    path = Path(folder) / "config.json"
    if not Path(folder).is_dir():
        raise CheckpointError(f"{folder}: no such folder; a Hugging Face checkpoint folder is needed")
    if not path.is_file():
        raise CheckpointError(f"{folder}: no config.json in it; a Hugging Face checkpoint folder is needed")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); is the download complete?") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    try:
        return parse_architecture(raw)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def parse_architecture(raw: Mapping[str, Any]) -> Architecture:
    """The same from the contents of the file.

    Raises:
      CheckpointError: a field is missing or wrong, or something is not supported.
    """
    family = family_of(raw.get("model_type"))
    try:
        return family.parse(raw)
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"a field has a wrong type or value ({error})") from error
