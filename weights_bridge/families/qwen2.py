"""Qwen2 and Qwen2.5: a decoder alone."""

from __future__ import annotations

from collections.abc import Iterator

from weights_bridge.architecture import Architecture
from weights_bridge.entries import Entry
from weights_bridge.families.decoder import decoder_entries, parse_text, special_ids
from weights_bridge.families.fields import Fields


def parse(raw: Fields) -> Architecture:
    """What `config.json` says; see `registry.Family`."""
    return Architecture(raw["model_type"], parse_text(raw, multimodal=False), **special_ids(raw))


def entries(model: Architecture, with_head: bool) -> Iterator[Entry]:
    """The model's tensors; see `registry.Family`."""
    yield from decoder_entries(model.text, with_head)
