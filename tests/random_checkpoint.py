"""Small random Hugging Face folders without torch: for what only needs a checkpoint, not what it computes.

Written with the safetensors library, so that whatever reads or writes them here is checked against it. The names
and shapes come from the bridge's own table; tests against transformers check that table.
"""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from weights_bridge.config_json import parse_architecture
from weights_bridge.entries import Entry
from weights_bridge.stream import TensorStream
from weights_bridge.tensor_table import layout

KINDS = ("qwen2", "qwen2_vl", "qwen2_5_vl")
CASES = [(kind, tied) for kind in KINDS for tied in (False, True)]

_TEXT = dict(
    hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=64,
)
_VISION = {
    "qwen2_vl": dict(depth=2, embed_dim=16, hidden_size=24, mlp_ratio=2, num_heads=2),
    "qwen2_5_vl": dict(depth=3, hidden_size=16, intermediate_size=20, out_hidden_size=24, num_heads=2),
}
_TOKEN_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
_NEW_NAMES = (("visual.", "model.visual."), ("model.", "model.language_model."))


def config_of(kind: str, tied: bool, **text: int) -> dict:
    """A config.json with the text model's fields at the top, as the hub's checkpoints have it."""
    config = {"model_type": kind, **_TEXT, **text, "tie_word_embeddings": tied, "torch_dtype": "float32"}
    if kind in _VISION:
        config["vision_config"] = dict(_VISION[kind])
        config["rope_scaling"] = {"type": "mrope", "mrope_section": [1, 1, 1]}
        config |= {name: 50 + number for number, name in enumerate(_TOKEN_IDS)}
    return config


def table(config: dict) -> tuple[Entry, ...]:
    """The bridge's table of the model."""
    return layout(parse_architecture(config))


def random_tensors(config: dict, dtype=np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    """A checkpoint's tensors by canonical name."""
    rng = np.random.default_rng(seed)
    return {e.hf_name: rng.standard_normal(e.shape, np.float32).astype(dtype) for e in table(config)}


def write_checkpoint(folder: Path, config: dict, tensors: dict[str, np.ndarray], shards: int = 1) -> Path:
    """config.json, weights in one file or in several with an index, and something for every kind of side file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("generation_config.json", "tokenizer.json", "preprocessor_config.json", "chat_template.jinja"):
        (folder / name).write_text(f'"{name}"')
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[number::shards])
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= {name: file for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def renamed(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The newer spelling of a vision-language model's names."""

    def new(name: str) -> str:
        for old, fresh in _NEW_NAMES:
            if name.startswith(old):
                return fresh + name.removeprefix(old)
        return name

    return {new(name): tensor for name, tensor in tensors.items()}


def joined(stream: TensorStream) -> dict[str, np.ndarray]:
    """A stream's tensors, put together from what comes in its buckets."""
    came = {spec.name: bytearray() for spec in stream.specs}
    for bucket in stream.buckets():
        for piece in bucket:
            assert piece.start == len(came[piece.name])
            came[piece.name] += piece.data.tobytes()
    return {spec.name: np.frombuffer(came[spec.name], spec.dtype).reshape(spec.shape) for spec in stream.specs}


def same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    """Same names, dtypes, shapes and bytes."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].shape == b[name].shape and a[name].tobytes() == b[name].tobytes()
        for name in a
    )


bfloat16 = ml_dtypes.bfloat16
