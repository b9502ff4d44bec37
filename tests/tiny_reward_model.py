"""Reward models without torch: the tiny model that ships with the package, with a random score head."""

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from lmmr1_jax.rollout.loaded_model import TINY_MODEL


def write(folder: Path, *, seed: int = 0, score_shape: tuple[int, ...] | None = None, **config: object) -> Path:
    """A complete Hugging Face folder; `config` replaces fields of config.json, and one that is None goes."""
    shutil.copytree(TINY_MODEL, folder)
    raw = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps({name: v for name, v in raw.items() if v is not None}))
    tensors = load_file(folder / "model.safetensors")
    rng = np.random.default_rng(seed)
    shape = (1, raw["hidden_size"]) if score_shape is None else score_shape
    tensors["score.weight"] = (rng.standard_normal(shape) / raw["hidden_size"] ** 0.5).astype(np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def change(folder: Path, **tensors: np.ndarray | None) -> Path:
    """Replaces tensors of a folder (dots written as __); None takes one out."""
    stored = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        name = name.replace("__", ".")
        stored.pop(name, None)
        if tensor is not None:
            stored[name] = tensor
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def names(folder: Path) -> list[str]:
    """Names of a folder's tensors."""
    return list(load_file(folder / "model.safetensors"))
