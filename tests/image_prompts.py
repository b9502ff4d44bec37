"""Encoded prompts of random text and images for the models of `oracle`, and the same as transformers takes them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import oracle

from lmmr1_jax.data.processor import Processor
from lmmr1_jax.models.positions import prompt_positions
from lmmr1_jax.types.records import EncodedPrompt, Image, Prompt

SIZES = [[], [(84, 84)], [(56, 140), (168, 112), (28, 28)]]
"""Images (height, width) of a prompt each: text alone, one image, several of odd sizes."""


def prompt(processor: Processor, sizes: Sequence[tuple[int, int]], number: int) -> EncodedPrompt:
    """Text, images, text; the image's pixels need no resizing."""
    images = tuple(
        Image(np.asarray(oracle.random_image(h, w, seed=number + i)), (1, h // 14, w // 14))
        for i, (h, w) in enumerate(sizes)
    )
    ids = oracle.text_tokens(9 + number, seed=number)
    for image in images:
        ids += oracle.vision_span(image.grid_thw)
    ids = np.asarray(ids + oracle.text_tokens(5, seed=100 + number), np.int32)
    positions, following = prompt_positions(ids, [image.grid_thw for image in images], processor.config)
    slots = np.flatnonzero(ids == oracle.token_id("<|image_pad|>"))
    return EncodedPrompt(Prompt([], None, str(number), "s", "f", number), ids, positions, images, slots, following)


def vision_arguments(processor: Processor, encoded: EncodedPrompt) -> dict:
    """The prompt's images as the oracle takes them."""
    if not encoded.images:
        return {}
    patches = [processor.patches(image) for image in encoded.images]
    return {"patches": patches, "grids": [image.grid_thw for image in encoded.images]}
