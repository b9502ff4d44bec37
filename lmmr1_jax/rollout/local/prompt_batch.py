"""Encoded prompts as arrays of fixed shape, for prefill and for scoring: rows padded on the right, images packed.

Shapes only ever grow, in few steps, so that a run compiles few programs. They are part of a run's state: padding can
change the last bit of a sum, so a resumed run goes on with the shapes that it had.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Float

from lmmr1_jax.models.vision_batch import pack_images, slots_needed
from lmmr1_jax.types.batches import VisionBatch
from lmmr1_jax.types.records import EncodedPrompt, Image
from weights_bridge.architecture import VisionConfig

SHORTEST_ROW = 64

PatchesOf = Callable[[Image], Float[np.ndarray, "patches values"]]


def round_up(size: int, multiple: int = 1) -> int:
    """`size` rounded up to three significant bits (64, 80, 96, 112, 128, 160, ...) and then to a multiple."""
    step = 1 << max(size.bit_length() - 3, 0)
    rounded = -(-size // step) * step
    return -(-rounded // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class PromptShapes:
    """The fixed shapes of a batch of prompts.

    Attributes:
      tokens: length of a row.
      image_slots: length of a vision row; 0 until an image has been seen.
      image_rows: vision rows in a batch.
    """

    tokens: int = 0
    image_slots: int = 0
    image_rows: int = 0

    def grown(
        self, parts: Sequence[Sequence[EncodedPrompt]], vision: VisionConfig | None, *, multiple: int = 1
    ) -> PromptShapes:
        """These shapes, enlarged until each part, a batch of its own, has room; vision rows are a multiple."""
        longest = max(len(encoded.token_ids) for part in parts for encoded in part)
        tokens = max(self.tokens, SHORTEST_ROW, round_up(longest))
        sizes = [[slots_needed(p.grid_thw, vision) for encoded in part for p in encoded.images] for part in parts]
        largest = max((size for part in sizes for size in part), default=0)
        if not largest:
            return dataclasses.replace(self, tokens=tokens)
        slots = max(self.image_slots, round_up(largest, vision.window_slots))
        rows = max(round_up(_rows_first_fit(part, slots), multiple) for part in sizes)
        return PromptShapes(tokens, slots, max(rows, self.image_rows))


@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """P padded prompts of L tokens.

    Attributes:
      tokens: int32 `[P, L]`.
      positions: int32 `[3, P, L]`.
      image_slots: int32 `[P, L]`, the merged image token that stands here, -1 for text.
      lengths: int32 `[P]`, at least 1.
      next_positions: int32 `[P]`, the first completion token's position.
      vision: the images of all the prompts, or None.
    """

    tokens: np.ndarray
    positions: np.ndarray
    image_slots: np.ndarray
    lengths: np.ndarray
    next_positions: np.ndarray
    vision: VisionBatch | None


jax.tree_util.register_dataclass(
    PromptBatch, data_fields=[field.name for field in dataclasses.fields(PromptBatch)], meta_fields=[]
)


def batch_prompts(
    batch: Sequence[EncodedPrompt],
    shapes: PromptShapes,
    vision: VisionConfig | None,
    patches_of: PatchesOf,
    *,
    rows: int,
) -> PromptBatch:
    """Lays `batch` out in `rows` rows of `shapes`; rows beyond the batch hold one padding token."""
    tokens = np.zeros((rows, shapes.tokens), np.int32)
    positions = np.zeros((3, rows, shapes.tokens), np.int32)
    image_slots = np.full((rows, shapes.tokens), -1, np.int32)
    lengths = np.ones(rows, np.int32)
    next_positions = np.zeros(rows, np.int32)
    for row, encoded in enumerate(batch):
        length = len(encoded.token_ids)
        tokens[row, :length] = encoded.token_ids
        positions[:, row, :length] = encoded.positions
        lengths[row], next_positions[row] = length, encoded.next_position
    vision_batch = None
    if shapes.image_rows:
        images = [(patches_of(image), image.grid_thw) for encoded in batch for image in encoded.images]
        vision_batch, slots = pack_images(images, vision, slots=shapes.image_slots, rows=shapes.image_rows)
        remaining = iter(slots)
        for row, encoded in enumerate(batch):
            if encoded.images:
                own = np.concatenate([next(remaining) for _ in encoded.images])
                image_slots[row, encoded.image_slots] = own
    return PromptBatch(tokens, positions, image_slots, lengths, next_positions, vision_batch)


def _rows_first_fit(sizes: Sequence[int], slots: int) -> int:
    """Rows of `slots` slots that images of these sizes take, each in the first row with room, as they are packed."""
    room: list[int] = []
    for size in sizes:
        row = next((index for index, free in enumerate(room) if free >= size), None)
        if row is None:
            room.append(slots - size)
        else:
            room[row] -= size
    return len(room)
