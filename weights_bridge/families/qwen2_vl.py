"""Qwen2-VL: a vision tower with layer norms, a plain MLP and attention over whole frames."""

from __future__ import annotations

from collections.abc import Iterator

from weights_bridge.architecture import Architecture, VisionConfig
from weights_bridge.entries import Entry
from weights_bridge.families.decoder import decoder_entries
from weights_bridge.families.fields import Fields, number, whole_number
from weights_bridge.families.vision import parse_vision_language, patch_fields, tower_entries


def parse(raw: Fields) -> Architecture:
    """What `config.json` says; see `registry.Family`."""
    return parse_vision_language(raw, _parse_tower)


def entries(model: Architecture, with_head: bool) -> Iterator[Entry]:
    """The model's tensors; see `registry.Family`."""
    yield from decoder_entries(model.text, with_head)
    yield from tower_entries(model.vision, norm_bias=True, mlp_in=[("mlp.fc1", "fc1")], mlp_out=("mlp.fc2", "fc2"))


def _parse_tower(fields: Fields, text_width: int) -> VisionConfig:
    """The tower's own width is `embed_dim`; `hidden_size` is the decoder's."""
    common, width = patch_fields(fields), whole_number(fields, "embed_dim", 1280)
    return VisionConfig(
        **common,
        hidden_size=width,
        intermediate_size=int(width * number(fields, "mlp_ratio", 4)),
        window_size=None,
        full_attention_blocks=tuple(range(common["depth"])),
        out_hidden_size=whole_number(fields, "hidden_size", text_width),
        hidden_act=fields.get("hidden_act", "quick_gelu"),
        tokens_per_second=1,
    )
