"""Qwen2.5-VL: a vision tower with RMS norms, a gated MLP and, in most layers, attention within windows."""

from __future__ import annotations

from collections.abc import Iterator

from weights_bridge.architecture import Architecture, VisionConfig
from weights_bridge.entries import Entry
from weights_bridge.errors import CheckpointError
from weights_bridge.families.decoder import decoder_entries
from weights_bridge.families.fields import Fields, number, whole_number
from weights_bridge.families.vision import parse_vision_language, patch_fields, tower_entries


def parse(raw: Fields) -> Architecture:
    """What `config.json` says; see `registry.Family`."""
    return parse_vision_language(raw, _parse_tower)


def entries(model: Architecture, with_head: bool) -> Iterator[Entry]:
    """The model's tensors; see `registry.Family`."""
    yield from decoder_entries(model.text, with_head)
    inward = [("mlp.gate_proj", "gate"), ("mlp.up_proj", "up")]
    yield from tower_entries(model.vision, norm_bias=False, mlp_in=inward, mlp_out=("mlp.down_proj", "down"))


def _parse_tower(fields: Fields, text_width: int) -> VisionConfig:
    tower = VisionConfig(
        **patch_fields(fields),
        hidden_size=whole_number(fields, "hidden_size"),
        intermediate_size=whole_number(fields, "intermediate_size"),
        window_size=whole_number(fields, "window_size", 112),
        full_attention_blocks=tuple(sorted(int(i) for i in fields.get("fullatt_block_indexes", (7, 15, 23, 31)))),
        out_hidden_size=whole_number(fields, "out_hidden_size", text_width),
        hidden_act=fields.get("hidden_act", "silu"),
        tokens_per_second=number(fields, "tokens_per_second", 4),
    )
    if tower.window_tokens < 1:
        raise CheckpointError(f"vision window_size {tower.window_size} is smaller than a merged token")
    return tower
