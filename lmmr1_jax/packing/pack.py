"""Groups into packed rows of static shape, and per-token values between completions and response slots.

    shapes = plan_shapes(rollouts, learner=..., max_new_tokens=..., vision=...)     # once, see shapes.py
    shapes = grow(shapes, minibatch, vision)                                        # hardly ever changes anything
    batch = pack(minibatch, shapes, vision, processor.patches)
    reference = scatter(reference_log_probs_per_completion, batch)                  # [n, R, M]
    per_completion = gather(log_probs, batch, completions)                          # and back

A row, with the queries that see each token (from low to before high), positions and response slots (completion a of
tokens a0 a1 a2 is predicted from the prompt's last token, a0 and a1; a2 itself is never read):

    index      0  1  2  3  4  5        slot       0  1  2  3  4
    tokens     P0 P1 P2 a0 a1 b0       target     a0 a1 a2 b0 b1
    low        0  1  2  3  4  5        source     2  3  4  2  5
    high       6  6  6  5  5  6        completion 0  0  0  1  1
    position   0  1  2  3  4  3
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from lmmr1_jax.models.vision_batch import pack_images
from lmmr1_jax.packing.layout import MicroBatch, PackShapes, Piece, group_sizes, lay_out
from lmmr1_jax.packing.shapes import grow, plan_shapes
from lmmr1_jax.types.batches import PackedBatch, VisionBatch
from lmmr1_jax.types.records import Image, Rollout
from weights_bridge.architecture import VisionConfig

__all__ = ["PackShapes", "gather", "grow", "pack", "plan_shapes", "scatter"]

PatchesOf = Callable[[Image], Float[np.ndarray, "patches values"]]


def pack(
    groups: Sequence[Rollout], shapes: PackShapes, vision: VisionConfig | None, patches_of: PatchesOf
) -> PackedBatch:
    """Packs a minibatch. Completions are numbered group by group, in the order given.

    Old and reference log-probs are left 0, to be filled through `scatter`; so are the advantages of groups that have
    none yet. The vision part is None exactly when `shapes.image_rows` is 0.

    Args:
      groups: the minibatch.
      shapes: must hold it; see `grow`.
      vision: the model's vision tower, None without.
      patches_of: the patches of an image, float32, in Hugging Face's order.

    Raises:
      ValueError: the groups need more micro-batches than the shapes have.
    """
    batches = lay_out(group_sizes(groups, vision), shapes)
    n, rows, length, slots = shapes.micro_batches, shapes.rows, shapes.row_length, shapes.response_slots
    if len(batches) > n:
        raise ValueError(f"{len(batches)} micro-batches are needed, the shapes have {n}: grow them first")
    tokens, low, high = (np.zeros((n, rows, length), np.int32) for _ in range(3))
    positions = np.zeros((n, 3, rows, length), np.int32)
    image_slots = np.full((n, rows, length), -1, np.int32)
    source, target = (np.zeros((n, rows, slots), np.int32) for _ in range(2))
    completion = np.full((n, rows, slots), -1, np.int32)
    images = _empty_vision(shapes, vision)
    first = [0, *itertools.accumulate(len(group.completions) for group in groups)]

    for m, batch in enumerate(batches):
        token_slots = _encode_images(m, batch, groups, shapes, vision, patches_of, images)
        for r, pieces in enumerate(batch.rows):
            row = _Row(
                tokens[m, r], low[m, r], high[m, r], positions[m, :, r], image_slots[m, r],
                source[m, r], target[m, r], completion[m, r],
            )  # fmt: skip
            for piece in pieces:
                group = groups[piece.group]
                row.add(piece, group, first[piece.group], token_slots.get(piece.group))

    everyone = [done for group in groups for done in group.completions]
    zeros = [np.zeros(len(done.token_ids), np.float32) for done in everyone]
    advantages = [
        group.advantages[i] if group.advantages else np.zeros(len(done.token_ids), np.float32)
        for group in groups
        for i, done in enumerate(group.completions)
    ]
    return PackedBatch(
        tokens=tokens,
        low=low,
        high=high,
        positions=positions,
        image_slots=image_slots,
        source=source,
        target=target,
        mask=(completion >= 0).astype(np.float32),
        completion=completion,
        advantages=_scatter(advantages, completion),
        old_log_probs=_scatter(zeros, completion),
        sampler_log_probs=_scatter([done.log_probs for done in everyone], completion),
        reference_log_probs=_scatter(zeros, completion),
        vision=images,
        micro_batches=np.asarray(len(batches), np.int32),
        tokens_total=np.asarray(sum(len(done.token_ids) for done in everyone), np.float32),
        completions_total=np.asarray(len(everyone), np.float32),
        kl_coefficient=np.zeros((), np.float32),
    )


def scatter(per_completion: Sequence[Float[np.ndarray, " tokens"]], batch: PackedBatch) -> Float[np.ndarray, "n R M"]:
    """Values per completion token, in the order of completions, into response slots; float32, 0 at padding.

    Raises:
      ValueError: a completion has another number of values than tokens.
    """
    return _scatter(per_completion, np.asarray(batch.completion))


def gather(values: Float[np.ndarray, "n R M"], batch: PackedBatch, count: int) -> list[Float[np.ndarray, " tokens"]]:
    """Values in response slots back to the minibatch's `count` completions; the inverse of `scatter`."""
    flat = np.asarray(batch.completion).reshape(-1)
    order, lengths = _slots_in_order(flat, count)
    return np.split(np.asarray(values).reshape(-1)[order], np.cumsum(lengths)[:-1]) if count else []


def _scatter(per_completion: Sequence[np.ndarray], completion: np.ndarray) -> np.ndarray:
    flat = completion.reshape(-1)
    order, lengths = _slots_in_order(flat, len(per_completion))
    for number, (values, length) in enumerate(zip(per_completion, lengths, strict=True)):
        if np.shape(values) != (length,):
            raise ValueError(f"completion {number} has {length} tokens and values of shape {np.shape(values)}")
    out = np.zeros(flat.shape, np.float32)
    if len(order):
        out[order] = np.concatenate(per_completion)
    return out.reshape(completion.shape)


def _slots_in_order(flat: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Slots sorted by completion, those of one in the order of its tokens; and each completion's number of slots."""
    held = np.flatnonzero(flat >= 0)
    order = held[np.argsort(flat[held], kind="stable")]
    lengths = np.bincount(flat[held], minlength=count)
    if len(lengths) != count:
        raise ValueError(f"the batch holds {len(lengths)} completions, not {count}")
    return order, lengths


class _Row:
    """A row being filled: views into the batch's arrays and how far they are full."""

    def __init__(self, tokens, low, high, positions, images, source, target, completion):
        self.tokens, self.low, self.high, self.positions = tokens, low, high, positions
        self.images, self.source, self.target, self.completion = images, source, target, completion
        self.at = self.slot = 0

    def add(self, piece: Piece, group: Rollout, first: int, token_slots: np.ndarray | None) -> None:
        """Appends a prompt and some of its completions, whose numbers start at `first`."""
        encoded = group.encoded
        start = self.at
        end = self._write(encoded.token_ids, encoded.positions)
        if token_slots is not None:
            self.images[start + encoded.image_slots] = token_slots
        for i in piece.completions:
            ids = np.asarray(group.completions[i].token_ids)
            body = self.at
            positions = np.broadcast_to(encoded.next_position + np.arange(len(ids) - 1), (3, len(ids) - 1))
            self._write(ids[:-1], positions)
            here = slice(self.slot, self.slot + len(ids))
            self.source[here] = np.concatenate([[end - 1], body + np.arange(len(ids) - 1)])
            self.target[here] = ids
            self.completion[here] = first + i
            self.slot += len(ids)
        self.high[start:end] = self.at  # the prompt is seen by all of them

    def _write(self, ids: np.ndarray, positions: np.ndarray) -> int:
        here = slice(self.at, self.at + len(ids))
        self.tokens[here], self.positions[:, here] = ids, positions
        self.low[here], self.high[here] = np.arange(here.start, here.stop), here.stop
        self.at += len(ids)
        return self.at


def _empty_vision(shapes: PackShapes, vision: VisionConfig | None) -> VisionBatch | None:
    if not shapes.image_rows:
        return None
    lead = (shapes.micro_batches, shapes.image_rows, shapes.image_slots)
    return VisionBatch(
        patches=np.zeros((*lead, vision.patch_values), np.float32),
        coordinates=np.zeros((*lead, 2), np.int32),
        low=np.zeros(lead, np.int32),
        high=np.zeros(lead, np.int32),
    )


def _encode_images(
    m: int,
    batch: MicroBatch,
    groups: Sequence[Rollout],
    shapes: PackShapes,
    vision: VisionConfig | None,
    patches_of: PatchesOf,
    out: VisionBatch | None,
) -> dict[int, np.ndarray]:
    """Fills the vision rows of micro-batch `m`; returns where each group's image tokens come out."""
    owners = [number for number in batch.groups for _ in groups[number].encoded.images]
    images = [image for number in batch.groups for image in groups[number].encoded.images]
    if not images:
        return {}
    made, token_slots = pack_images(
        [(patches_of(image), image.grid_thw) for image in images],
        vision,
        slots=shapes.image_slots,
        rows=shapes.image_rows,
    )
    out.patches[m], out.coordinates[m], out.low[m], out.high[m] = made.patches, made.coordinates, made.low, made.high
    return {
        number: np.concatenate([slots for owner, slots in zip(owners, token_slots, strict=True) if owner == number])
        for number in dict.fromkeys(owners)
    }
