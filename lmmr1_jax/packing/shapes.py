"""How large packed batches are: planned once from the first rollout and the limits, then only ever grown.

Every shape is a compiled program of its own, so a run keeps one. Padding is computed like anything else, so sizes are
chosen by what the first rollout would cost in them, while the longest completions still fit: groups that have become
longer than a row are cut. The number of micro-batches costs nothing until it is used: it is planned for the worst.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from lmmr1_jax.config.schema import LearnerConfig
from lmmr1_jax.packing.layout import GroupSize, PackShapes, first_fit, group_sizes, lay_out
from lmmr1_jax.runtime.errors import UserError
from lmmr1_jax.types.records import Rollout
from weights_bridge.architecture import VisionConfig

LONGEST_ROW = 4096
"""A row is planned longer than this only for a prompt with a completion that are."""
TOKENS_PER_DEVICE = 4096
"""Row tokens of a micro-batch on each device, if rows are not longer than this."""
CPU_TOKENS = 3072
"""The same on a CPU, where nothing is gained by more and memory is."""
_UNLIMITED = 1 << 40
_TYPICAL_WIDTH = 1024
_SAMPLE = 64  # groups that row lengths are tried on


def plan_shapes(
    groups: Sequence[Rollout],
    *,
    learner: LearnerConfig,
    max_new_tokens: int,
    vision: VisionConfig | None,
    minibatch_groups: int | None = None,
    row_devices: int = 1,
    tokens_per_device: int = TOKENS_PER_DEVICE,
) -> PackShapes:
    """The shapes of a run.

    Args:
      groups: the first rollout.
      learner: the fields row_length, rows and image_rows fix a size where they are not 0.
      max_new_tokens: no completion is longer.
      vision: the model's vision tower, None without.
      minibatch_groups: groups in a minibatch; all of `groups` when None.
      row_devices: devices that rows are split over.
      tokens_per_device: a micro-batch's row tokens on each device.

    Raises:
      UserError: a fixed size cannot hold what it must, or `learner.rows` cannot be split over the devices.
    """
    count = minibatch_groups or len(groups)
    sizes = group_sizes(groups, vision)
    longest, shortest = max(s.prompt for s in sizes), min(s.prompt for s in sizes)
    generations = max(len(s.completions) for s in sizes)
    sample = sizes[: min(count, _SAMPLE)]
    limit = max(max_new_tokens, max(max(s.completions, default=0) for s in sizes))
    one = longest + limit - 1
    if 0 < learner.row_length < one:
        raise UserError(
            f"learner.row_length {learner.row_length} is shorter than a prompt of {longest} tokens with a completion "
            f"of {limit}"
        )
    whole = longest + generations * (limit - 1) if learner.share_prompts else one
    free = PackShapes(
        row_length=0,
        response_slots=_UNLIMITED,
        rows=1,
        image_rows=_UNLIMITED,
        image_slots=_image_slots(sizes, vision),
        micro_batches=1,
        share_prompts=learner.share_prompts,
        pack=learner.pack,
        row_devices=row_devices,
        fixed_row_length=learner.row_length > 0,
        fixed_image_rows=learner.image_rows > 0,
    )
    lengths = [learner.row_length] if learner.row_length else _row_lengths(one, whole, learner.pack)
    options = []
    for length in lengths:
        shapes = dataclasses.replace(free, row_length=length)
        filled = max((sum(piece.slots for piece in batch.rows[0]) for batch in lay_out(sample, shapes)), default=1)
        in_group = generations * limit if learner.share_prompts else limit
        slots = max(filled, in_group * max(length // whole if learner.pack else 1, 1))
        slots = min(slots, length - shortest + (length // whole + 1) * generations)
        shapes = dataclasses.replace(shapes, response_slots=max(round_up(slots), limit))
        options.append(dataclasses.replace(shapes, rows=_rows(sample, count, shapes, learner, tokens_per_device)))
    width = _TYPICAL_WIDTH if vision is None else vision.out_hidden_size
    shapes = min(options, key=lambda option: _cost(sample, option, width))

    shapes = dataclasses.replace(shapes, image_rows=_image_rows(sizes[:count], shapes, learner))
    worst = [GroupSize(longest, (limit,) * generations, s.images) for s in (sizes * count)[:count]]
    micro_batches = max(1, len(lay_out(worst, shapes)), len(lay_out(sizes[:count], shapes)))
    return dataclasses.replace(shapes, micro_batches=micro_batches)


def grow(shapes: PackShapes, groups: Sequence[Rollout], vision: VisionConfig | None) -> PackShapes:
    """The same shapes if the groups of a minibatch fit them, else the least enlarged that hold them.

    Raises:
      UserError: a size that the user fixed would have to grow.
    """
    sizes = group_sizes(groups, vision)
    one = max(s.prompt + max(max(s.completions, default=0) - 1, 0) for s in sizes)
    longest = max(max(s.completions, default=0) for s in sizes)
    if one > shapes.row_length:
        if shapes.fixed_row_length:
            raise UserError(
                f"learner.row_length {shapes.row_length} is shorter than a prompt with its completion, {one} tokens"
            )
        shapes = dataclasses.replace(shapes, row_length=round_up(one))
    if longest > shapes.response_slots:
        shapes = dataclasses.replace(shapes, response_slots=round_up(longest))
    needed = _image_slots(sizes, vision)
    if needed > shapes.image_slots:
        shapes = dataclasses.replace(shapes, image_slots=needed)
    if shapes.image_slots:
        rows = max(len(first_fit(s.images, shapes.image_slots)) for s in sizes)
        if rows > shapes.image_rows and shapes.fixed_image_rows:
            raise UserError(f"learner.image_rows {shapes.image_rows} is too few: one prompt's images need {rows}")
        shapes = dataclasses.replace(shapes, image_rows=max(shapes.image_rows, _multiple(rows, shapes.row_devices)))
    used = len(lay_out(sizes, shapes))
    if used > shapes.micro_batches:
        shapes = dataclasses.replace(shapes, micro_batches=_significant(used))
    return shapes


def tokens_per_device() -> int:
    """A micro-batch's row tokens on each of the devices that JAX has here."""
    return CPU_TOKENS if jax.default_backend() == "cpu" else TOKENS_PER_DEVICE


def round_up(size: int) -> int:
    """A multiple of 64, of 128 from 2,048 on: few different shapes, little padding."""
    return _multiple(size, 64 if size <= 2048 else 128)


def _multiple(size: int, of: int) -> int:
    return -(-size // of) * of


def _significant(size: int) -> int:
    """Up to a number of two significant bits (1, 2, 3, 4, 6, 8, 12, ...), so that growing is rare."""
    unit = 1 << max(size.bit_length() - 2, 0)
    return _multiple(size, unit)


def _image_slots(sizes: Sequence[GroupSize], vision: VisionConfig | None) -> int:
    """The longest image, in windows of two significant bits if there are several."""
    longest = max((slots for size in sizes for slots in size.images), default=0)
    return 0 if vision is None else _significant(-(-longest // vision.window_slots)) * vision.window_slots


def _row_lengths(one: int, whole: int, pack: bool) -> list[int]:
    """Lengths to choose from, between a prompt with one completion and four whole groups."""
    most = max(one, min(4 * whole, LONGEST_ROW)) if pack else whole
    return sorted({round_up(int(size)) for size in (*np.linspace(one, most, 16), max(min(whole, most), one))})


def _cost(sizes: Sequence[GroupSize], shapes: PackShapes, width: int) -> float:
    """What the groups cost in these shapes, padding included, up to a factor: matrix products of some 24 * width^2
    for each token and layer, attention of 4 * width for each pair of tokens, and the head for each response slot,
    taken as half of what the layers cost a token."""
    rows = shapes.rows * len(lay_out(sizes, shapes))
    return rows * (shapes.row_length * (1 + shapes.row_length / (6 * width)) + shapes.response_slots / 2)


def _rows(
    sample: Sequence[GroupSize], count: int, shapes: PackShapes, learner: LearnerConfig, tokens_per_device: int
) -> int:
    """Rows of a micro-batch: as many as the token budget allows, evened out over what `count` groups need."""
    devices = shapes.row_devices
    if learner.rows:
        if learner.rows % devices:
            raise UserError(f"learner.rows {learner.rows} must be a multiple of the {devices} devices that split them")
        return learner.rows
    needed = max(-(-len(lay_out(sample, shapes)) * count // len(sample)), 1)  # with one row in a micro-batch
    most = devices * max(tokens_per_device // shapes.row_length, 1)
    if any(size.images for size in sample):  # a group whose images are encoded once must fit as a whole
        per_group = max(max(len(lay_out([size], shapes)) for size in sample), 1)
        most = max(_multiple(most // per_group * per_group, devices), _multiple(per_group, devices))
    micro_batches = -(-needed // most)
    return _multiple(-(-needed // micro_batches), devices)


def _image_rows(sizes: Sequence[GroupSize], shapes: PackShapes, learner: LearnerConfig) -> int:
    """Vision rows that the fullest micro-batch of these groups needs."""
    if not shapes.image_slots:
        return 0
    if learner.image_rows:
        if learner.image_rows % shapes.row_devices:
            raise UserError(
                f"learner.image_rows {learner.image_rows} must be a multiple of the {shapes.row_devices} devices "
                "that split them"
            )
        return learner.image_rows
    return _multiple(max((len(batch.vision) for batch in lay_out(sizes, shapes)), default=1) or 1, shapes.row_devices)
