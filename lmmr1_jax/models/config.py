"""What a checkpoint's own `config.json` says about its model, read into frozen dataclasses.

Two layouts are in use: the hub's checkpoints keep the text fields at the top level with `rope_theta` and
`rope_scaling`; transformers 5 writes a `text_config` with `rope_parameters`. Both are read; what the models here
can't compute is refused by name.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from lmmr1_jax.runtime.errors import UserError

MODEL_TYPES = ("qwen2", "qwen2_vl", "qwen2_5_vl")


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The decoder.

    Attributes:
      mrope_section: how many of the head_dim / 2 rotary frequencies turn with the temporal, height and width
        position; None for one-dimensional positions.
      tie_word_embeddings: whether the head is the embedding.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int] | None
    tie_word_embeddings: bool


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision tower.

    Attributes:
      kind: "qwen2_vl" has layer norms and a plain MLP; "qwen2_5_vl" has RMS norms, a gated MLP and windows.
      window_size: side of an attention window in pixels; None where every layer attends to the whole frame.
      full_attention_blocks: the layers that attend to the whole frame; all of them without windows.
      out_hidden_size: width of the merged tokens, the decoder's.
      tokens_per_second: temporal positions per second of video; 1 for Qwen2-VL, which counts frames.
    """

    kind: Literal["qwen2_vl", "qwen2_5_vl"]
    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    in_channels: int
    window_size: int | None
    full_attention_blocks: tuple[int, ...]
    out_hidden_size: int
    hidden_act: str
    tokens_per_second: float

    @property
    def patch_values(self) -> int:
        """Numbers in a patch: 1176 for 14x14 pixels of two RGB frames."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """Patches that merge into one token."""
        return self.spatial_merge_size**2

    @property
    def window_tokens(self) -> int:
        """Merged tokens along a window's side; 0 without windows."""
        return 0 if self.window_size is None else self.window_size // self.patch_size // self.spatial_merge_size

    @property
    def window_slots(self) -> int:
        """Patches in a whole window; one merge unit without windows. Row lengths are multiples of it."""
        return max(self.window_tokens, 1) ** 2 * self.merge_unit


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A supported model. The token ids are None for models without vision."""

    model_type: str
    text: TextConfig
    vision: VisionConfig | None = None
    image_token_id: int | None = None
    video_token_id: int | None = None
    vision_start_token_id: int | None = None
    vision_end_token_id: int | None = None


def read_config(folder: str | Path) -> ModelConfig:
    """Read `config.json` of a Hugging Face folder.

    Raises:
      UserError: the file is missing, no JSON, lacks a field, or asks for something unsupported.
    """
    path = Path(folder) / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: no readable config.json; give the folder of a Hugging Face checkpoint") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); is the download complete?") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: must hold a JSON object")
    try:
        return parse_config(raw)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except KeyError as error:
        raise UserError(f"{path}: the field {error} is missing") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: a field has a wrong type or value ({error})") from None


def parse_config(raw: dict[str, Any]) -> ModelConfig:
    """The same from the parsed JSON.

    Raises:
      UserError: something that is not supported; KeyError: a missing field.
    """
    model_type = raw.get("model_type")
    if model_type not in MODEL_TYPES:
        raise UserError(f"model_type {model_type!r} is not supported; supported are {', '.join(MODEL_TYPES)}")
    text = _text(raw, raw.get("text_config") or raw, multimodal=model_type != "qwen2")
    if model_type == "qwen2":
        return ModelConfig(model_type, text)
    return ModelConfig(
        model_type,
        text,
        _vision(model_type, raw["vision_config"], text.hidden_size),
        image_token_id=int(raw["image_token_id"]),
        video_token_id=int(raw["video_token_id"]),
        vision_start_token_id=int(raw["vision_start_token_id"]),
        vision_end_token_id=int(raw["vision_end_token_id"]),
    )


def num_heads_by_axis(config: ModelConfig) -> dict[str, int]:
    """The number of attention heads that a logical axis of the parameters holds; heads are never cut in two."""
    heads = {"heads": config.text.num_heads, "kv_heads": config.text.num_kv_heads}
    return heads | ({"vision_heads": config.vision.num_heads} if config.vision is not None else {})


def _text(raw: dict[str, Any], fields: dict[str, Any], *, multimodal: bool) -> TextConfig:
    if fields.get("hidden_act", "silu") != "silu":
        raise UserError(f"hidden_act {fields['hidden_act']!r} of the decoder is not supported; supported is silu")
    layers, heads = int(fields["num_hidden_layers"]), int(fields["num_attention_heads"])
    _refuse_sliding_window(fields, layers)
    hidden = int(fields["hidden_size"])
    head_dim = int(fields.get("head_dim") or hidden // heads)
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "mrope"):
        raise UserError(f"rope type {rope_type!r} is not supported; supported are default and mrope")
    section = tuple(int(n) for n in rope.get("mrope_section", (16, 24, 24))) if multimodal else None
    if section is not None and (len(section) != 3 or sum(section) != head_dim // 2):
        raise UserError(f"mrope_section {list(section)} must be three numbers that add up to {head_dim // 2}")
    theta = rope.get("rope_theta", fields.get("rope_theta", 1_000_000.0 if multimodal else 10_000.0))
    return TextConfig(
        vocab_size=int(fields["vocab_size"]),
        hidden_size=hidden,
        intermediate_size=int(fields["intermediate_size"]),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=int(fields.get("num_key_value_heads") or heads),
        head_dim=head_dim,
        rms_norm_eps=float(fields.get("rms_norm_eps", 1e-5 if multimodal else 1e-6)),
        rope_theta=float(theta),
        mrope_section=section,
        tie_word_embeddings=bool(raw.get("tie_word_embeddings") or fields.get("tie_word_embeddings", False)),
    )


def _refuse_sliding_window(fields: dict[str, Any], layers: int) -> None:
    """Checkpoints often name a window that no layer uses: only one in use is refused."""
    types = fields.get("layer_types")
    if types is None:
        windowed = bool(fields.get("use_sliding_window")) and fields.get("sliding_window") is not None
        in_use = windowed and int(fields.get("max_window_layers", layers)) < layers
    else:
        in_use = any(kind != "full_attention" for kind in types)
    if in_use:
        raise UserError("sliding-window attention in the decoder is not supported; supported is full attention")


def _vision(kind: str, fields: dict[str, Any], text_hidden: int) -> VisionConfig:
    depth = int(fields.get("depth", 32))
    common = dict(
        kind=kind,
        depth=depth,
        num_heads=int(fields.get("num_heads", 16)),
        patch_size=int(fields.get("patch_size", 14)),
        temporal_patch_size=int(fields.get("temporal_patch_size", 2)),
        spatial_merge_size=int(fields.get("spatial_merge_size", 2)),
        in_channels=int(fields.get("in_channels", fields.get("in_chans", 3))),
    )
    if kind == "qwen2_vl":
        width = int(fields.get("embed_dim", 1280))
        made = VisionConfig(
            **common,
            hidden_size=width,
            intermediate_size=int(width * fields.get("mlp_ratio", 4)),
            window_size=None,
            full_attention_blocks=tuple(range(depth)),
            out_hidden_size=int(fields.get("hidden_size", text_hidden)),
            hidden_act=fields.get("hidden_act", "quick_gelu"),
            tokens_per_second=1,
        )
    else:
        made = VisionConfig(
            **common,
            hidden_size=int(fields["hidden_size"]),
            intermediate_size=int(fields["intermediate_size"]),
            window_size=int(fields.get("window_size", 112)),
            full_attention_blocks=tuple(sorted(int(i) for i in fields.get("fullatt_block_indexes", (7, 15, 23, 31)))),
            out_hidden_size=int(fields.get("out_hidden_size", text_hidden)),
            hidden_act=fields.get("hidden_act", "silu"),
            tokens_per_second=fields.get("tokens_per_second", 4),
        )
        if made.window_tokens < 1:
            raise UserError(f"vision window_size {made.window_size} is smaller than a merged token")
    if made.hidden_act not in ("silu", "quick_gelu", "gelu"):
        raise UserError(f"vision hidden_act {made.hidden_act!r} is not supported; supported: silu, quick_gelu, gelu")
    if made.out_hidden_size != text_hidden:
        raise UserError(f"the vision tower ends at width {made.out_hidden_size}, the decoder has {text_hidden}")
    return made
