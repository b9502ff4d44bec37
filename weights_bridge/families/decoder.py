"""The decoder that the families share: Qwen2's, with positions of one or of three dimensions."""

from __future__ import annotations

from collections.abc import Iterator

from weights_bridge.architecture import TextConfig
from weights_bridge.entries import EMBEDDING_NAME, HEAD_NAME, Entry, Stack, plain
from weights_bridge.errors import CheckpointError
from weights_bridge.families.fields import Fields, number, optional_whole_number, table, whole_number


def parse_text(raw: Fields, *, multimodal: bool) -> TextConfig:
    """The decoder's fields, from `text_config` where there is one, else from the top level."""
    fields = table(raw, "text_config") or raw
    if fields.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"hidden_act {fields['hidden_act']!r} of the decoder is not supported; supported is silu")
    hidden, heads = whole_number(fields, "hidden_size"), whole_number(fields, "num_attention_heads")
    layers = whole_number(fields, "num_hidden_layers")
    _refuse_sliding_window(fields, layers)
    head_dim = whole_number(fields, "head_dim", hidden // heads)
    rope = table(fields, "rope_parameters") or table(fields, "rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "mrope"):
        raise CheckpointError(f"rope type {rope_type!r} is not supported; supported are default and mrope")
    section = tuple(int(n) for n in rope.get("mrope_section", (16, 24, 24))) if multimodal else None
    if section is not None and (len(section) != 3 or sum(section) != head_dim // 2):
        raise CheckpointError(f"mrope_section {list(section)} must be three numbers that add up to {head_dim // 2}")
    positions = optional_whole_number(fields, "max_position_embeddings")
    return TextConfig(
        vocab_size=whole_number(fields, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=whole_number(fields, "intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=whole_number(fields, "num_key_value_heads", heads),
        head_dim=head_dim,
        rms_norm_eps=number(fields, "rms_norm_eps", 1e-5 if multimodal else 1e-6),
        rope_theta=number(rope if "rope_theta" in rope else fields, "rope_theta", 1e6 if multimodal else 1e4),
        mrope_section=section,
        # Either level may say so.
        tie_word_embeddings=bool(raw.get("tie_word_embeddings") or fields.get("tie_word_embeddings")),
        max_position_embeddings=positions or optional_whole_number(raw, "max_position_embeddings"),
    )


def special_ids(raw: Fields) -> dict[str, object]:
    """`eos_token_ids` and `pad_token_id` of an `Architecture`: end tokens from the top level before `text_config`,
    padding from `text_config` before the top level, as transformers reads it."""
    text = table(raw, "text_config") or {}
    ends = next((ids for ids in (raw.get("eos_token_id"), text.get("eos_token_id")) if ids not in (None, [])), [])
    padding = optional_whole_number(text, "pad_token_id", least=0)
    if padding is None:
        padding = optional_whole_number(raw, "pad_token_id", least=0)
    ends = tuple(int(i) for i in (ends if isinstance(ends, list) else [ends]))
    return {"eos_token_ids": ends, "pad_token_id": padding}


def decoder_entries(text: TextConfig, with_head: bool) -> Iterator[Entry]:
    """The decoder's tensors; an untied head over the vocabulary where `with_head`."""
    width, layers, feed, vocab = text.hidden_size, text.num_layers, text.intermediate_size, text.vocab_size
    q, kv = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    projections = (("q", "query", q, "heads"), ("k", "key", kv, "kv_heads"), ("v", "value", kv, "kv_heads"))
    yield plain(EMBEDDING_NAME, "language/embed/embedding", (vocab, width), ("vocab", "embed"))
    for n in range(layers):
        stack = Stack(f"model.layers.{n}", "language/layers", n, layers)
        yield stack.vector("input_layernorm.weight", "input_norm/scale", width)
        for name, leaf, size, axis in projections:
            yield stack.kernel(f"self_attn.{name}_proj.weight", f"{leaf}/kernel", width, size, ("embed", axis))
            yield stack.vector(f"self_attn.{name}_proj.bias", f"{leaf}/bias", size, axis)
        yield stack.kernel("self_attn.o_proj.weight", "output/kernel", q, width, ("heads", "embed"))
        yield stack.vector("post_attention_layernorm.weight", "mlp_norm/scale", width)
        yield stack.kernel("mlp.gate_proj.weight", "gate/kernel", width, feed, ("embed", "mlp"))
        yield stack.kernel("mlp.up_proj.weight", "up/kernel", width, feed, ("embed", "mlp"))
        yield stack.kernel("mlp.down_proj.weight", "down/kernel", feed, width, ("mlp", "embed"))
    yield plain("model.norm.weight", "language/norm/scale", (width,), (None,))
    if with_head:
        yield plain(HEAD_NAME, "language/head/embedding", (vocab, width), ("vocab", "embed"))


def _refuse_sliding_window(fields: Fields, layers: int) -> None:
    """Checkpoints often name a window that no layer uses: only one in use is refused."""
    types = fields.get("layer_types")
    if types is None:
        windowed = bool(fields.get("use_sliding_window")) and fields.get("sliding_window") is not None
        in_use = windowed and whole_number(fields, "max_window_layers", layers, least=0) < layers
    else:
        in_use = any(kind != "full_attention" for kind in types)
    if in_use:
        raise CheckpointError("sliding-window attention in the decoder is not supported; supported is full attention")
