"""Positions against transformers' get_rope_index."""

import numpy as np
import pytest

from lmmr1_jax.models.positions import prompt_positions
from weights_bridge.architecture import Architecture, TextConfig
from weights_bridge.config_json import read_architecture


def theirs(folder, token_ids, images, videos, seconds):
    import oracle
    import torch

    inputs = oracle.hf_inputs(token_ids)
    types = (inputs["input_ids"] == oracle.token_id("<|image_pad|>")).int()
    types += 2 * (inputs["input_ids"] == oracle.token_id("<|video_pad|>")).int()
    extra = {} if seconds is None else {"second_per_grid_ts": torch.tensor(seconds)}
    positions, _ = oracle.load_model(folder).model.get_rope_index(
        inputs["input_ids"],
        mm_token_type_ids=types,
        image_grid_thw=torch.tensor(images) if images else None,
        video_grid_thw=torch.tensor(videos) if videos else None,
        **extra,
    )
    return positions[:, 0].numpy()


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
def test_positions_equal_transformers_for_images_and_videos(kind):
    pytest.importorskip("torch")
    import oracle

    folder = oracle.random_model(kind)
    config = read_architecture(folder)
    rng = np.random.default_rng(0)
    for case in range(12):
        tokens, grids, images, videos = oracle.text_tokens(int(rng.integers(0, 5)), case), [], [], []
        for _ in range(int(rng.integers(1, 5))):
            is_video = rng.random() < 0.4
            grid = (int(rng.integers(1, 5)) if is_video else 1, *(2 * rng.integers(1, 9, 2)).tolist())
            grids.append(grid)
            (videos if is_video else images).append(grid)
            tokens += oracle.vision_span(grid, "<|video_pad|>" if is_video else "<|image_pad|>")
            tokens += oracle.text_tokens(int(rng.integers(0, 4)), case)
        seconds = [0.5 + 0.73 * i for i in range(len(videos))] if kind == "qwen2_5_vl" and case % 2 else None
        positions, following = prompt_positions(tokens, grids, config, second_per_grid_ts=seconds)
        continued, _ = prompt_positions([*tokens, 5, 6], grids, config, second_per_grid_ts=seconds)
        np.testing.assert_array_equal(positions, theirs(folder, tokens, images, videos, seconds))
        np.testing.assert_array_equal(continued, theirs(folder, [*tokens, 5, 6], images, videos, seconds))
        assert positions.dtype == np.int32
        np.testing.assert_array_equal(continued[:, len(tokens)], following)


def test_text_counts_equally_in_all_three_rows():
    text = TextConfig(16, 8, 8, 1, 1, 1, 8, 1e-6, 1e4, None, True)
    positions, following = prompt_positions([3, 1, 4], [], Architecture("qwen2", text))
    np.testing.assert_array_equal(positions, [[0, 1, 2]] * 3)
    assert following == 3


def test_grids_that_do_not_fit_the_tokens_are_refused():
    pytest.importorskip("torch")
    import oracle

    config = read_architecture(oracle.random_model("qwen2_5_vl"))
    span = oracle.vision_span((1, 4, 6))
    for tokens, grids in (([1, 2], [(1, 4, 6)]), (span, []), (span, [(1, 4, 8)]), (span[:-2], [(1, 4, 6)])):
        with pytest.raises(ValueError):
            prompt_positions(tokens, grids, config)
