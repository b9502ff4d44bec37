"""Padded batches of prompts: shapes grow in few steps and never shrink; images land where their tokens are."""

import numpy as np

from lmmr1_jax.rollout.local.prompt_batch import PromptShapes, batch_prompts, round_up
from lmmr1_jax.types.records import EncodedPrompt, Image, Prompt
from weights_bridge.architecture import VisionConfig

VISION = VisionConfig(2, 32, 48, 2, 14, 2, 2, 3, 112, (1,), 64, "silu", 2.0)


def encoded(length: int, grids=()) -> EncodedPrompt:
    """A prompt whose first tokens, after one of text, are its images'."""
    images = tuple(Image(np.zeros((h * 14, w * 14, 3), np.uint8), (1, h, w)) for h, w in grids)
    merged = sum(h * w // 4 for h, w in grids)
    return EncodedPrompt(
        prompt=Prompt([], None, "0", "source", "file", 0),
        token_ids=np.arange(100, 100 + length, dtype=np.int32),
        positions=np.tile(np.arange(length, dtype=np.int32), (3, 1)),
        images=images,
        image_slots=np.arange(1, 1 + merged, dtype=np.int32),
        next_position=length,
    )


def patches_of(image: Image) -> np.ndarray:
    return np.full((int(np.prod(image.grid_thw)), 1176), sum(image.grid_thw), np.float32)


def test_sizes_are_rounded_to_three_bits():
    assert [round_up(n) for n in (1, 7, 8, 9, 65, 80, 81, 129, 1000)] == [1, 7, 8, 10, 80, 80, 96, 160, 1024]
    assert round_up(65, 64) == 128


def test_shapes_never_shrink_and_every_part_fits():
    shapes = PromptShapes().grown([[encoded(10)]], VISION)
    assert shapes == PromptShapes(64, 0, 0)
    small, large = encoded(100, [(6, 6)]), encoded(70, [(6, 6), (10, 18)])
    shapes = shapes.grown([[small] * 3, [large]], VISION)
    assert shapes == PromptShapes(112, 384, 2)  # 10 x 18 patches lie in 2 x 3 windows of 64
    assert shapes.grown([[encoded(3)]], VISION) == shapes


def test_rows_are_padded_and_image_tokens_point_at_their_own_patches():
    batch = [encoded(9), encoded(30, [(6, 6), (4, 4)])]
    shapes = PromptShapes().grown([batch], VISION)
    arrays = batch_prompts(batch, shapes, VISION, patches_of, rows=3)
    assert arrays.lengths.tolist() == [9, 30, 1] and arrays.next_positions.tolist() == [9, 30, 0]
    assert arrays.lengths.tolist() == [9, 30, 1]
    assert arrays.tokens[0, :9].tolist() == list(range(100, 109)) and not arrays.tokens[0, 9:].any()
    assert (arrays.image_slots[0] == -1).all()
    slots = arrays.image_slots[1]
    assert (slots >= 0).nonzero()[0].tolist() == list(range(1, 14))
    values = arrays.vision.patches.reshape(-1, 4, 1176)[:, 0, 0]
    assert values[slots[1:10]].tolist() == [13.0] * 9 and values[slots[10:14]].tolist() == [9.0] * 4
