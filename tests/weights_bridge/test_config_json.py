"""config.json in both layouts, and what is refused by name."""

import json

import pytest

from weights_bridge.config_json import parse_architecture, read_architecture
from weights_bridge.errors import CheckpointError

TEXT = dict(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-6,
)
IDS = dict(image_token_id=7, video_token_id=8, vision_start_token_id=5, vision_end_token_id=6)
TOWER = dict(
    depth=4,
    hidden_size=32,
    intermediate_size=48,
    num_heads=2,
    out_hidden_size=64,
    patch_size=14,
    spatial_merge_size=2,
    temporal_patch_size=2,
    window_size=112,
    fullatt_block_indexes=[1, 3],
    tokens_per_second=2,
)
OLD = dict(
    TEXT,
    **IDS,
    model_type="qwen2_5_vl",
    rope_theta=1e6,
    rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]},
    tie_word_embeddings=True,
    use_sliding_window=False,
    sliding_window=32768,
    max_window_layers=2,
    vision_config=dict(TOWER, in_chans=3),
)
NEW = dict(
    IDS,
    model_type="qwen2_5_vl",
    tie_word_embeddings=True,
    text_config=dict(
        TEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        layer_types=["full_attention"] * 3,
    ),
    vision_config=dict(TOWER, in_channels=3),
)


def test_the_old_and_the_new_layout_say_the_same():
    assert parse_architecture(OLD) == parse_architecture(NEW)
    config = parse_architecture(OLD)
    assert config.text.head_dim == 16 and config.text.rope_theta == 1e6 and config.text.tie_word_embeddings
    assert config.vision.window_slots == 64 and config.vision.patch_values == 1176


def test_a_tower_of_qwen2_vl_has_its_width_in_embed_dim():
    vision = dict(depth=2, embed_dim=32, hidden_size=64, mlp_ratio=4, num_heads=2)
    config = parse_architecture(dict(OLD, model_type="qwen2_vl", vision_config=vision))
    assert (config.vision.hidden_size, config.vision.out_hidden_size) == (32, 64)
    assert config.vision.intermediate_size == 128 and config.vision.window_size is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model_type="llama"), "qwen2, qwen2_vl, qwen2_5_vl"),
        (dict(rope_scaling={"type": "yarn", "mrope_section": [2, 3, 3]}), "'yarn' is not supported"),
        (dict(rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]}), "add up to 8"),
        (dict(use_sliding_window=True), "sliding-window"),
        (dict(hidden_act="gelu"), "'gelu' of the decoder"),
        (dict(vision_config=dict(TOWER, out_hidden_size=80)), "width 80"),
        (dict(vision_config=dict(TOWER, hidden_act="relu")), "'relu'"),
        (dict(vision_config=dict(TOWER, depth=0)), "depth is 0, a positive whole number"),
        (dict(vision_config=None), "vision_config is missing"),
        (dict(text_config=[1]), "text_config is \\[1\\], an object"),
        (dict(vision_config=dict(TOWER, fullatt_block_indexes=7)), "wrong type"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change, message):
    with pytest.raises(CheckpointError, match=message):
        parse_architecture(dict(OLD, **change))


def test_a_file_that_cannot_be_read_gives_one_line(tmp_path):
    path = tmp_path / "config.json"
    for content, message in (
        (None, "no config.json in it"),
        ("{", "not valid JSON"),
        ("[]", "JSON object"),
        (json.dumps({k: v for k, v in OLD.items() if k != "hidden_size"}), "hidden_size is missing"),
        (json.dumps(dict(OLD, vocab_size="many")), "vocab_size is 'many', a positive whole number"),
    ):
        if content is not None:
            path.write_text(content)
        with pytest.raises(CheckpointError, match=message) as caught:
            read_architecture(tmp_path)
        assert "\n" not in str(caught.value)


def test_either_level_of_a_config_may_tie_the_head():
    text = NEW["text_config"]
    assert parse_architecture(NEW).text.tie_word_embeddings
    below = dict(NEW, tie_word_embeddings=False, text_config=dict(text, tie_word_embeddings=True))
    assert parse_architecture(below).text.tie_word_embeddings
    nowhere = {name: value for name, value in NEW.items() if name != "tie_word_embeddings"}
    assert not parse_architecture(nowhere).text.tie_word_embeddings


def test_special_tokens_and_positions_are_found_on_both_levels():
    said = dict(eos_token_id=3, pad_token_id=0, max_position_embeddings=256)
    for config in (dict(OLD, **said), dict(NEW, **said), dict(NEW, text_config=dict(NEW["text_config"], **said))):
        found = parse_architecture(config)
        assert (found.eos_token_ids, found.pad_token_id, found.text.max_position_embeddings) == ((3,), 0, 256)
    several = dict(NEW, eos_token_id=[], text_config=dict(NEW["text_config"], eos_token_id=[4, 3]))
    assert parse_architecture(several).eos_token_ids == (4, 3)
