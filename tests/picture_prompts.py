"""Encoded prompts of random text and pictures for the models of `oracle`, and the same as transformers takes them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import oracle

from lmmr1_jax.data.processor import Processor
from lmmr1_jax.models.positions import prompt_positions
from lmmr1_jax.types.records import EncodedPrompt, Picture, Prompt

SIZES = [[], [(84, 84)], [(56, 140), (168, 112), (28, 28)]]
"""Pictures (height, width) of a prompt each: text alone, one picture, several of odd sizes."""


def prompt(processor: Processor, sizes: Sequence[tuple[int, int]], number: int) -> EncodedPrompt:
    """Text, pictures, text; the picture's pixels need no resizing."""
    pictures = tuple(
        Picture(np.asarray(oracle.random_picture(h, w, seed=number + i)), (1, h // 14, w // 14))
        for i, (h, w) in enumerate(sizes)
    )
    ids = oracle.text_tokens(9 + number, seed=number)
    for picture in pictures:
        ids += oracle.vision_span(picture.grid_thw)
    ids = np.asarray(ids + oracle.text_tokens(5, seed=100 + number), np.int32)
    positions, following = prompt_positions(ids, [picture.grid_thw for picture in pictures], processor.config)
    slots = np.flatnonzero(ids == oracle.token_id("<|image_pad|>"))
    return EncodedPrompt(Prompt([], None, str(number), "s", "f", number), ids, positions, pictures, slots, following)


def vision_arguments(processor: Processor, encoded: EncodedPrompt) -> dict:
    """The prompt's pictures as the oracle takes them."""
    if not encoded.pictures:
        return {}
    patches = [processor.patches(picture) for picture in encoded.pictures]
    return {"patches": patches, "grids": [picture.grid_thw for picture in encoded.pictures]}
