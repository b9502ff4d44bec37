"""What a model's folder says beside its weights: tokenizer, chat template, end tokens, how images are normalised."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lmmr1_jax.data.images import ImageFormat
from lmmr1_jax.models.families import family_of
from lmmr1_jax.runtime.errors import UserError
from weights_bridge.architecture import Architecture


def read_json(path: Path) -> dict[str, Any]:
    """The file's object; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object")
    return value


def read_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer of a folder; raises UserError where it can't be read."""
    # transformers would say on stderr that it has no torch, which is as it should be.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer  # takes seconds to import

    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise UserError(f"{folder}: no tokenizer.json; give the folder of a whole Hugging Face checkpoint")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the loaders raise their own, Rust's and JSON's errors
        raise UserError(f"{folder}: the tokenizer cannot be read: {' '.join(str(error).split())[:300]}") from None


def read_chat_template(folder: Path, tokenizer: Any) -> str:
    """The processor's own template where there is one, as transformers prefers it, else the tokenizer's."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = read_json(folder / "chat_template.json").get("chat_template") or tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not isinstance(template, str) or not template:
        raise UserError(f"{folder}: the model has no chat template (chat_template.jinja or in tokenizer_config.json)")
    return template


def read_end_ids(folder: Path, config: Architecture, tokenizer: Any) -> tuple[int, ...]:
    """`eos_token_id` of generation_config.json, else of config.json, else the tokenizer's."""
    generation = read_json(folder / "generation_config.json")
    for found in (generation.get("eos_token_id"), list(config.eos_token_ids), tokenizer.eos_token_id):
        if found is not None and found != []:
            return tuple(dict.fromkeys(int(i) for i in (found if isinstance(found, list) else [found])))
    raise UserError(f"{folder}: no end token: neither generation_config.json, config.json nor the tokenizer names one")


def read_image_format(folder: Path, config: Architecture, min_pixels: int, max_pixels: int) -> ImageFormat:
    """Normalisation from preprocessor_config.json (processor_config.json in newer folders), limits from the caller.

    Raises:
      UserError: it cuts images into other patches than the model's, or the limits make no sense.
    """
    raw = read_json(folder / "preprocessor_config.json")
    raw = raw or read_json(folder / "processor_config.json").get("image_processor") or {}
    defaults, vision = ImageFormat(**family_of(config).image_format), config.vision
    form = ImageFormat(
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
        mean=tuple(raw.get("image_mean", defaults.mean)),
        std=tuple(raw.get("image_std", defaults.std)),
        rescale=raw.get("rescale_factor", defaults.rescale),
    )
    for name in ("patch_size", "temporal_patch_size", "merge_size"):
        if raw.get(name, getattr(form, name)) != getattr(form, name):
            raise UserError(f"{folder}: preprocessor_config.json has another {name} than config.json")
    if not form.factor**2 <= max_pixels:
        raise UserError(f"data.max_pixels {max_pixels} must be at least {form.factor**2}, one image token")
    if not 0 <= min_pixels <= max_pixels:
        raise UserError(f"data.min_pixels {min_pixels} must be between 0 and data.max_pixels {max_pixels}")
    return form
