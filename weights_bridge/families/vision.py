"""What the vision towers of Qwen2-VL and Qwen2.5-VL share: most of their fields and tensors, and the token ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from weights_bridge.architecture import Architecture, VisionConfig
from weights_bridge.entries import Entry, Stack, Transform, plain
from weights_bridge.errors import CheckpointError
from weights_bridge.families.decoder import parse_text, special_ids
from weights_bridge.families.fields import Fields, table, whole_number

TOKEN_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
ACTIVATIONS = ("silu", "quick_gelu", "gelu")


def parse_vision_language(raw: Fields, parse_tower: Callable[[Fields, int], VisionConfig]) -> Architecture:
    """A decoder with a tower; `parse_tower` reads `vision_config`, given the decoder's width as well."""
    text, fields = parse_text(raw, multimodal=True), table(raw, "vision_config")
    if fields is None:
        raise CheckpointError("the field vision_config is missing")
    vision = parse_tower(fields, text.hidden_size)
    if vision.hidden_act not in ACTIVATIONS:
        raise CheckpointError(
            f"vision hidden_act {vision.hidden_act!r} is not supported; supported: {', '.join(ACTIVATIONS)}"
        )
    if vision.out_hidden_size != text.hidden_size:
        raise CheckpointError(
            f"the vision tower ends at width {vision.out_hidden_size}, the decoder has {text.hidden_size}"
        )
    ids = {name: whole_number(raw, name, least=0) for name in TOKEN_IDS}
    return Architecture(raw["model_type"], text, vision, **ids, **special_ids(raw))


def patch_fields(fields: Fields) -> dict[str, Any]:
    """The fields of a `VisionConfig` that both towers spell alike, with transformers' defaults."""
    return dict(
        depth=whole_number(fields, "depth", 32),
        num_heads=whole_number(fields, "num_heads", 16),
        patch_size=whole_number(fields, "patch_size", 14),
        temporal_patch_size=whole_number(fields, "temporal_patch_size", 2),
        spatial_merge_size=whole_number(fields, "spatial_merge_size", 2),
        in_channels=whole_number(fields, "in_channels", fields.get("in_chans", 3)),
    )


def tower_entries(
    vision: VisionConfig, *, norm_bias: bool, mlp_in: Sequence[tuple[str, str]], mlp_out: tuple[str, str]
) -> Iterator[Entry]:
    """A tower's tensors.

    Args:
      vision: its sizes.
      norm_bias: whether norms have biases.
      mlp_in: names of a block's layers from the stream's width to the MLP's, in the checkpoint and in the tree.
      mlp_out: those of the layer that leads back.
    """
    width, feed, out, patch = vision.hidden_size, vision.intermediate_size, vision.out_hidden_size, vision.patch_size
    merged = width * vision.merge_unit
    yield Entry(
        "visual.patch_embed.proj.weight", ("vision", "patch", "kernel"), None,
        Transform((width, vision.patch_values), (1, 0)),
        (width, vision.in_channels, vision.temporal_patch_size, patch, patch), (vision.patch_values, width),
        ("patch", "vision_embed"),
    )  # fmt: skip
    for n in range(vision.depth):
        stack = Stack(f"visual.blocks.{n}", "vision/blocks", n, vision.depth)
        for norm in ("norm1", "norm2"):
            yield stack.vector(f"{norm}.weight", f"{norm}/scale", width)
            if norm_bias:
                yield stack.vector(f"{norm}.bias", f"{norm}/bias", width)
        yield stack.entry(
            "attn.qkv.weight", "qkv/kernel", Transform((3, width, width), (2, 0, 1)), (3 * width, width),
            ("vision_embed", None, "vision_heads"),
        )  # fmt: skip
        yield stack.entry(
            "attn.qkv.bias", "qkv/bias", Transform((3, width), (0, 1)), (3 * width,), (None, "vision_heads")
        )
        yield stack.kernel("attn.proj.weight", "proj/kernel", width, width, ("vision_heads", "vision_embed"))
        yield stack.vector("attn.proj.bias", "proj/bias", width)
        for name, leaf in mlp_in:
            yield stack.kernel(f"{name}.weight", f"{leaf}/kernel", width, feed, ("vision_embed", "vision_mlp"))
            yield stack.vector(f"{name}.bias", f"{leaf}/bias", feed, "vision_mlp")
        name, leaf = mlp_out
        yield stack.kernel(f"{name}.weight", f"{leaf}/kernel", feed, width, ("vision_mlp", "vision_embed"))
        yield stack.vector(f"{name}.bias", f"{leaf}/bias", width)
    yield plain("visual.merger.ln_q.weight", "vision/merger/norm/scale", (width,), (None,))
    if norm_bias:
        yield plain("visual.merger.ln_q.bias", "vision/merger/norm/bias", (width,), (None,))
    for name, leaf, size, axes in (
        ("0", "fc1", merged, ("vision_embed", "vision_mlp")),
        ("2", "fc2", out, ("vision_mlp", "embed")),
    ):
        yield Entry(
            f"visual.merger.mlp.{name}.weight", ("vision", "merger", leaf, "kernel"), None,
            Transform((size, merged), (1, 0)), (size, merged), (merged, size), axes,
        )  # fmt: skip
        bias_axis = axes[1] if leaf == "fc1" else None
        yield plain(f"visual.merger.mlp.{name}.bias", f"vision/merger/{leaf}/bias", (size,), (bias_axis,))
