"""What `config.json` says about a model, as frozen dataclasses; `config_json.py` reads them.

The fields have one name and one meaning for every family, whatever the checkpoints call them.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The decoder.

    Attributes:
      mrope_section: how many of the head_dim / 2 rotary frequencies turn with the temporal, height and width
        position; None for one-dimensional positions.
      tie_word_embeddings: whether the head is the embedding.
      max_position_embeddings: tokens of the longest sequence that the model is meant for; None where none is named.
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
    max_position_embeddings: int | None = None


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision tower.

    Attributes:
      window_size: side of an attention window in pixels; None where every layer attends to the whole frame.
      full_attention_blocks: the layers that attend to the whole frame; all of them without windows.
      out_hidden_size: width of the merged tokens, the decoder's.
      tokens_per_second: temporal positions per second of video; 1 for Qwen2-VL, which counts frames.
    """

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
class Architecture:
    """A supported model.

    Attributes:
      model_type: names the family.
      text: the decoder.
      vision: the vision tower; None for a model of text, whose image, video and vision token ids are None too.
      eos_token_ids: the end tokens that `config.json` itself names, often none.
      pad_token_id: the padding token that it names.
    """

    model_type: str
    text: TextConfig
    vision: VisionConfig | None = None
    image_token_id: int | None = None
    video_token_id: int | None = None
    vision_start_token_id: int | None = None
    vision_end_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None


def num_heads_by_axis(model: Architecture) -> dict[str, int]:
    """The number of attention heads that a logical axis of the parameters holds; heads are never cut in two."""
    heads = {"heads": model.text.num_heads, "kv_heads": model.text.num_kv_heads}
    return heads | ({"vision_heads": model.vision.num_heads} if model.vision is not None else {})
