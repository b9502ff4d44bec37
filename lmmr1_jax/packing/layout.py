"""Which completions stand in which row of which micro-batch: sizes only, no arrays.

    group 0: prompt of 5, completions of 4 and 3      row 0:  P P P P P a a a b b  .  .
    group 1: prompt of 2, completions of 2 and 6      row 1:  Q Q c d d d d d  .  .  .  .

A group's prompt stands once in a row and its completions follow (`share_prompts`), or every completion has a copy of
its own. A completion's last token is predicted but never read, so it takes a response slot and no place in the row.
A group too long for one row is cut over several, each with the prompt. A group's rows stay in one micro-batch where
possible, so that its images are encoded once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from lmmr1_jax.models.vision_batch import slots_needed
from lmmr1_jax.runtime.errors import UserError
from lmmr1_jax.types.records import Rollout
from weights_bridge.architecture import VisionConfig


@dataclasses.dataclass(frozen=True)
class PackShapes:
    """The static shape of every packed batch of a run; plain numbers, so that a checkpoint can hold it.

    Attributes:
      row_length: tokens in a row, L.
      response_slots: predicted tokens in a row, M.
      rows: rows in a micro-batch, R, a multiple of `row_devices`.
      image_rows: vision rows in a micro-batch, a multiple of `row_devices`; 0 where there are no images.
      image_slots: patches in a vision row, a multiple of the tower's window.
      micro_batches: n.
      share_prompts: a group's prompt stands once in a row, else each completion carries a copy.
      pack: several prompts in a row, else one.
      row_devices: devices that rows are split over.
      fixed_row_length, fixed_image_rows: set by the user, so never grown.
    """

    row_length: int
    response_slots: int
    rows: int
    image_rows: int
    image_slots: int
    micro_batches: int
    share_prompts: bool = True
    pack: bool = True
    row_devices: int = 1
    fixed_row_length: bool = False
    fixed_image_rows: bool = False


@dataclasses.dataclass(frozen=True)
class GroupSize:
    """What counts of a group: tokens of its prompt and of each completion, vision slots of each image."""

    prompt: int
    completions: tuple[int, ...]
    images: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Piece:
    """A prompt with some of its group's completions, in one row.

    Attributes:
      group: the group's number.
      completions: numbers within the group.
      tokens: places in the row.
      slots: response slots.
    """

    group: int
    completions: tuple[int, ...]
    tokens: int
    slots: int


@dataclasses.dataclass
class MicroBatch:
    """Rows that go through the models at once, while they are being filled.

    Attributes:
      rows: the pieces of each row.
      free: tokens and slots left in each row.
      groups: groups present, in the order in which their images are encoded.
      vision: slots used in each vision row.
      room: tokens that the emptiest row has left; says no quickly to most of what does not fit.
    """

    rows: list[list[Piece]] = dataclasses.field(default_factory=list)
    free: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    groups: list[int] = dataclasses.field(default_factory=list)
    vision: list[int] = dataclasses.field(default_factory=list)
    room: int | None = None


def group_sizes(groups: Sequence[Rollout], vision: VisionConfig | None) -> list[GroupSize]:
    """The sizes of sampled groups."""
    return [
        GroupSize(
            prompt=len(group.encoded.token_ids),
            completions=tuple(len(completion.token_ids) for completion in group.completions),
            images=tuple(slots_needed(image.grid_thw, vision) for image in group.encoded.images),
        )
        for group in groups
    ]


def lay_out(sizes: Sequence[GroupSize], shapes: PackShapes) -> list[MicroBatch]:
    """Deals groups to micro-batches, largest first, each into the first that has room.

    Deterministic: a function of the sizes and shapes alone. `shapes.micro_batches` is not looked at.

    Raises:
      UserError: something does not fit an empty micro-batch.
    """
    cut = [_pieces(number, size, shapes) for number, size in enumerate(sizes)]
    batches: list[MicroBatch] = []
    for number in sorted(range(len(sizes)), key=lambda g: (-sum(piece.tokens for piece in cut[g]), g)):
        pieces, images = cut[number], sizes[number].images
        if not pieces:
            continue
        # Without images nothing is gained by keeping the rows together, and the gaps are filled better.
        together = [pieces] if images else [[piece] for piece in pieces]
        for some in together:
            if _place(batches, some, images, shapes):
                continue
            for piece in some if len(some) > 1 else ():
                if not _place(batches, [piece], images, shapes):
                    raise UserError(_too_large(sizes[number], shapes))
            if len(some) == 1:
                raise UserError(_too_large(sizes[number], shapes))
    return batches


def _place(batches: list[MicroBatch], pieces: list[Piece], images: tuple[int, ...], shapes: PackShapes) -> bool:
    """Puts the pieces of a group together into the first micro-batch with room; opens one if that helps."""
    for batch in batches:
        if _try(batch, pieces, images, shapes):
            return True
    fresh = MicroBatch()
    if _try(fresh, pieces, images, shapes):
        batches.append(fresh)
        return True
    return False


def _try(batch: MicroBatch, pieces: list[Piece], images: tuple[int, ...], shapes: PackShapes) -> bool:
    if batch.room is not None and max(piece.tokens for piece in pieces) > batch.room:
        return False
    new_group = pieces[0].group not in batch.groups
    vision = batch.vision
    if new_group and images:
        vision = first_fit(images, shapes.image_slots, batch.vision)
        if vision is None or len(vision) > shapes.image_rows:
            return False
    free, at = list(batch.free), []
    for piece in pieces:
        row = len(free)
        if shapes.pack:
            fits = (r for r, (tokens, slots) in enumerate(free) if piece.tokens <= tokens and piece.slots <= slots)
            row = next(fits, row)
        if row == len(free):
            if row == shapes.rows or piece.tokens > shapes.row_length or piece.slots > shapes.response_slots:
                return False
            free.append((shapes.row_length, shapes.response_slots))
        free[row] = (free[row][0] - piece.tokens, free[row][1] - piece.slots)
        at.append(row)
    batch.free, batch.vision = free, vision
    unopened = len(free) < shapes.rows
    batch.room = shapes.row_length if unopened else max(tokens for tokens, _ in free) if shapes.pack else 0
    batch.rows += [[] for _ in range(len(free) - len(batch.rows))]
    for row, piece in zip(at, pieces, strict=True):
        batch.rows[row].append(piece)
    if new_group:
        batch.groups.append(pieces[0].group)
    return True


def first_fit(images: Sequence[int], slots: int, rows: Sequence[int] = ()) -> list[int] | None:
    """Slots used in each vision row after the images were placed as `pack_images` places them.

    Returns None where an image is longer than a row of `slots`.
    """
    rows = list(rows)
    for need in images:
        if need > slots:
            return None
        row = next((r for r, used in enumerate(rows) if used + need <= slots), len(rows))
        if row == len(rows):
            rows.append(0)
        rows[row] += need
    return rows


def _pieces(number: int, size: GroupSize, shapes: PackShapes) -> list[Piece]:
    """A group cut into what fits a row: the completions, longest first, each into the first piece with room."""
    everyone = [i for i, length in enumerate(size.completions) if length]
    if not shapes.share_prompts:
        return [_piece(number, size, [i]) for i in everyone]
    whole = _piece(number, size, everyone)
    if everyone and whole.tokens <= shapes.row_length and whole.slots <= shapes.response_slots:
        return [whole]
    parts: list[list[int]] = []
    for i in sorted(everyone, key=lambda i: (-size.completions[i], i)):
        for part in parts:
            longer = _piece(number, size, [*part, i])
            if longer.tokens <= shapes.row_length and longer.slots <= shapes.response_slots:
                part.append(i)
                break
        else:
            parts.append([i])
    return [_piece(number, size, sorted(part)) for part in parts]


def _piece(number: int, size: GroupSize, members: Sequence[int]) -> Piece:
    slots = sum(size.completions[i] for i in members)
    tokens = size.prompt + sum(max(size.completions[i] - 1, 0) for i in members)
    return Piece(group=number, completions=tuple(members), tokens=tokens, slots=slots)


def _too_large(size: GroupSize, shapes: PackShapes) -> str:
    longest = max(size.completions, default=0)
    return (
        f"a prompt of {size.prompt} tokens with a completion of {longest} and {sum(size.images)} image slots does "
        f"not fit a micro-batch of rows of {shapes.row_length} tokens with {shapes.response_slots} response slots "
        f"(learner.row_length) and {shapes.image_rows} vision rows of {shapes.image_slots} (learner.image_rows)"
    )
