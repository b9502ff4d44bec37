"""However groups are packed, every completion token is predicted from exactly its prompt and what came before it."""

import dataclasses
import json

import numpy as np
import pytest

from lmmr1_jax.config.schema import LearnerConfig
from lmmr1_jax.packing.pack import PackShapes, gather, grow, pack, plan_shapes, scatter
from lmmr1_jax.runtime.errors import UserError
from lmmr1_jax.types.records import Completion, EncodedPrompt, Image, Prompt, Rollout
from weights_bridge.architecture import VisionConfig

IMAGE = 999
VISION = VisionConfig(
    depth=2, hidden_size=8, intermediate_size=8, num_heads=1, patch_size=14, temporal_patch_size=2,
    spatial_merge_size=2, in_channels=3, window_size=56, full_attention_blocks=(1,), out_hidden_size=8,
    hidden_act="silu", tokens_per_second=2,
)  # fmt: skip


def patches_of(image):
    """Recognisable patches: image number and patch number."""
    count = int(np.prod(image.grid_thw))
    numbers = int(image.pixels[0, 0, 0]) * 1000 + np.arange(count, dtype=np.float32)
    return np.broadcast_to(numbers[:, None], (count, VISION.patch_values))


def group(rng, number, *, text, lengths, grids=(), advantages=True):
    """A group whose tokens, positions and log-probs are all different."""
    ids, slots = list(1000 * (number + 1) + np.arange(text)), []
    for grid in grids:
        merged = int(np.prod(grid)) // 4
        slots += range(len(ids), len(ids) + merged)
        ids += [IMAGE] * merged + [1000 * (number + 1) + 500]
    positions = np.sort(rng.integers(0, 50, (3, len(ids))), axis=1).astype(np.int32)
    images = tuple(Image(np.full((1, 1, 1), 10 * number + i, np.uint8), grid) for i, grid in enumerate(grids))
    prompt = Prompt([], None, str(number), "made", "made", number)
    encoded = EncodedPrompt(
        prompt, np.asarray(ids, np.int32), positions, images, np.asarray(slots, np.int32), int(positions.max()) + 1
    )
    completions = tuple(
        Completion(rng.integers(0, 900, n).astype(np.int32), rng.normal(size=n).astype(np.float32), "stop", np.zeros(n))
        for n in lengths
    )
    values = tuple(rng.normal(size=n).astype(np.float32) for n in lengths) if advantages else ()
    return Rollout(encoded, completions, (), values)


def make_groups(seed, count=6, generations=4, limit=20, images=True):
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        merged = rng.integers(1, 5, (rng.integers(0, 3) if images else 0, 2))
        grids = [(1, 2 * int(h), 2 * int(w)) for h, w in merged]
        lengths = rng.integers(1, limit + 1, generations)
        made.append(group(rng, number, text=int(rng.integers(3, 30)), lengths=lengths, grids=grids))
    return made


def check(groups, batch):
    """Reads the batch back token by token, by the one rule of visibility."""
    completions = [(g, c) for g in groups for c in g.completions]
    seen = [set() for _ in completions]
    n = int(batch.micro_batches)
    assert (batch.completion[n:] == -1).all() and (batch.high[n:] == 0).all()
    for m, r, s in np.argwhere(batch.completion >= 0):
        number = batch.completion[m, r, s]
        owner, completion = completions[number]
        t = len(seen[number])
        seen[number].add(t)
        assert batch.target[m, r, s] == completion.token_ids[t]
        query = batch.source[m, r, s]
        visible = np.flatnonzero((batch.low[m, r] <= query) & (query < batch.high[m, r]))
        expected = np.concatenate([owner.encoded.token_ids, completion.token_ids[:t]])
        assert batch.tokens[m, r, visible].tolist() == expected.tolist()
        after = np.broadcast_to(owner.encoded.next_position + np.arange(t), (3, t))
        assert (batch.positions[m, :, r, visible].T == np.concatenate([owner.encoded.positions, after], 1)).all()
        if t == 0:
            _check_images(owner, batch, m, batch.image_slots[m, r, visible])
    assert [len(s) for s in seen] == [len(c.token_ids) for _, c in completions]
    assert batch.tokens_total == sum(len(s) for s in seen) and batch.completions_total == len(completions)
    assert (batch.mask == (batch.completion >= 0)).all()
    assert (batch.image_slots[batch.tokens != IMAGE] == -1).all()


def _check_images(owner, batch, m, image_slots):
    assert (np.flatnonzero(image_slots >= 0) == owner.encoded.image_slots).all()
    if not owner.encoded.images:
        return
    merged = batch.vision.patches[m].reshape(-1, 4, VISION.patch_values)[image_slots[owner.encoded.image_slots]]
    expected = np.concatenate([patches_of(image) for image in owner.encoded.images])
    assert (merged.reshape(-1, VISION.patch_values) == expected).all()


MODES = [(share, packed) for share in (True, False) for packed in (True, False)]


@pytest.mark.parametrize("share, packed", MODES)
@pytest.mark.parametrize("seed", range(4))
def test_every_token_sees_its_prompt_and_its_past_and_nothing_else(share, packed, seed):
    groups = make_groups(seed)
    learner = LearnerConfig(share_prompts=share, pack=packed)
    shapes = plan_shapes(groups, learner=learner, max_new_tokens=20, vision=VISION, tokens_per_device=200)
    batch = pack(groups, shapes, VISION, patches_of)
    assert batch.tokens.shape == (shapes.micro_batches, shapes.rows, shapes.row_length)
    check(groups, batch)
    if not packed:
        rows = batch.tokens.reshape(-1, shapes.row_length)
        assert max(len({token // 1000 for token in row if token >= 1000}) for row in rows) == 1


@pytest.mark.parametrize("share, packed", MODES)
def test_a_group_too_long_for_a_row_is_cut_and_its_images_encoded_once(share, packed):
    rng = np.random.default_rng(0)
    groups = [group(rng, 0, text=10, lengths=[9, 17, 3, 12, 20, 1], grids=[(1, 4, 4), (1, 2, 6)])]
    learner = LearnerConfig(share_prompts=share, pack=packed, row_length=50)
    shapes = plan_shapes(groups, learner=learner, max_new_tokens=20, vision=VISION)
    batch = pack(groups, shapes, VISION, patches_of)
    check(groups, batch)
    assert int(batch.micro_batches) == 1 and (batch.high[0, :, 0] > 0).sum() >= 2
    assert len(np.unique(batch.vision.patches[batch.vision.high > 0][:, 0])) == 16 + 12
    assert (batch.vision.high > 0).sum() == 16 + 12


def test_a_group_too_long_for_a_micro_batch_brings_its_images_to_each():
    rng = np.random.default_rng(0)
    groups = [group(rng, 0, text=10, lengths=[20] * 6, grids=[(1, 4, 4)])]
    shapes = PackShapes(64, 64, 1, 1, 16, 6, share_prompts=True)
    batch = pack(groups, shapes, VISION, patches_of)
    check(groups, batch)
    used = int(batch.micro_batches)
    assert used == 3 and ((batch.vision.high > 0).sum((1, 2))[:used] == 16).all()


def test_text_alone_needs_no_vision_rows():
    groups = make_groups(1, images=False)
    for vision in (None, VISION):
        shapes = plan_shapes(groups, learner=LearnerConfig(), max_new_tokens=20, vision=vision)
        batch = pack(groups, shapes, vision, patches_of)
        assert batch.vision is None
        check(groups, batch)


def test_a_minibatch_of_text_in_a_run_with_images_has_the_same_structure():
    shapes = plan_shapes(make_groups(2), learner=LearnerConfig(), max_new_tokens=20, vision=VISION)
    groups = make_groups(3, images=False)
    batch = pack(groups, grow(shapes, groups, VISION), VISION, patches_of)
    assert batch.vision is not None and (batch.vision.high == 0).all()
    check(groups, batch)


def test_a_shared_prompt_stands_once_and_a_copied_one_with_every_completion():
    rng = np.random.default_rng(0)
    groups = [group(rng, 0, text=7, lengths=[5, 6, 7, 8])]
    for share, copies in ((True, 1), (False, 4)):
        learner = LearnerConfig(share_prompts=share)
        shapes = plan_shapes(groups, learner=learner, max_new_tokens=8, vision=None)
        batch = pack(groups, shapes, None, patches_of)
        assert (batch.tokens == 1003).sum() == copies
        check(groups, batch)


def test_values_go_to_slots_and_back_unchanged():
    groups = make_groups(5)
    shapes = plan_shapes(groups, learner=LearnerConfig(), max_new_tokens=20, vision=VISION, tokens_per_device=100)
    batch = pack(groups, shapes, VISION, patches_of)
    everyone = [c for g in groups for c in g.completions]
    values = [c.token_ids.astype(np.float32) for c in everyone]
    slots = scatter(values, batch)
    assert (slots == np.where(batch.completion >= 0, batch.target, 0)).all()
    back = gather(slots, batch, len(everyone))
    assert [b.tolist() for b in back] == [v.tolist() for v in values]
    assert [v.tolist() for v in gather(batch.sampler_log_probs, batch, len(everyone))] == [
        c.log_probs.tolist() for c in everyone
    ]
    assert [v.tolist() for v in gather(batch.advantages, batch, len(everyone))] == [
        a.tolist() for g in groups for a in g.advantages
    ]
    assert (batch.old_log_probs == 0).all() and (batch.reference_log_probs == 0).all()


def test_values_of_another_length_are_refused():
    groups = make_groups(5, count=1)
    shapes = plan_shapes(groups, learner=LearnerConfig(), max_new_tokens=20, vision=VISION)
    batch = pack(groups, shapes, VISION, patches_of)
    values = [c.token_ids.astype(np.float32) for c in groups[0].completions]
    with pytest.raises(ValueError, match="completion 1"):
        scatter([values[0], values[1][:-1], *values[2:]], batch)
    with pytest.raises(ValueError, match="completions"):
        scatter(values[:-1], batch)


def test_empty_and_single_token_completions_and_missing_advantages_are_packed():
    rng = np.random.default_rng(0)
    groups = [
        group(rng, 0, text=5, lengths=[0, 1, 3], advantages=False),
        group(rng, 1, text=1, lengths=[1, 0, 1], advantages=False),
        group(rng, 2, text=4, lengths=[0, 0], advantages=False, grids=[(1, 2, 2)]),
    ]
    for share in (True, False):
        learner = LearnerConfig(share_prompts=share)
        shapes = plan_shapes(groups, learner=learner, max_new_tokens=3, vision=VISION)
        batch = pack(groups, shapes, VISION, patches_of)
        check(groups, batch)
        assert [len(v) for v in gather(batch.mask, batch, 8)] == [0, 1, 3, 1, 0, 1, 0, 0]
        assert (batch.advantages == 0).all()


def test_groups_of_which_nothing_was_sampled_make_an_empty_batch():
    groups = [group(np.random.default_rng(0), 0, text=4, lengths=[0, 0], grids=[(1, 2, 2)])]
    shapes = plan_shapes(groups, learner=LearnerConfig(), max_new_tokens=3, vision=VISION)
    batch = pack(groups, shapes, VISION, patches_of)
    check(groups, batch)
    assert int(batch.micro_batches) == 0 and [len(v) for v in gather(batch.mask, batch, 2)] == [0, 0]


def test_rows_are_as_long_as_pays_off():
    """Groups of full length fill a row of their own to the last 64th; shorter ones share longer rows."""
    rng = np.random.default_rng(0)
    full = [group(rng, i, text=65, lengths=[64] * 8) for i in range(8)]
    shapes = plan_shapes(full, learner=LearnerConfig(), max_new_tokens=64, vision=None)
    assert (shapes.row_length, shapes.response_slots) == (65 + 8 * 63 + 7, 8 * 64)
    part = [group(rng, i, text=65, lengths=rng.integers(20, 45, 8)) for i in range(32)]
    shapes = plan_shapes(part, learner=LearnerConfig(), max_new_tokens=64, vision=None)
    batch = pack(part, shapes, None, patches_of)
    assert (batch.high[: int(batch.micro_batches)] > 0).mean() > 0.75


def test_packing_is_a_function_of_its_input():
    groups = make_groups(7, count=10)
    shapes = plan_shapes(groups, learner=LearnerConfig(), max_new_tokens=20, vision=VISION, tokens_per_device=200)
    one, two = (pack(groups, shapes, VISION, patches_of) for _ in range(2))
    assert (one.tokens == two.tokens).all() and (one.completion == two.completion).all()


@pytest.mark.parametrize("share, packed", MODES)
def test_shapes_planned_from_one_rollout_hold_the_longest_completions_of_the_next(share, packed):
    learner = LearnerConfig(share_prompts=share, pack=packed)
    first = make_groups(8, count=12, limit=6)
    shapes = plan_shapes(first, learner=learner, max_new_tokens=40, vision=VISION, tokens_per_device=256)
    rng = np.random.default_rng(0)
    longest = [
        dataclasses.replace(
            g,
            completions=tuple(
                Completion(rng.integers(0, 900, 40).astype(np.int32), np.zeros(40, np.float32), "length", np.zeros(40))
                for _ in g.completions
            ),
            advantages=(),
        )
        for g in first
    ]
    assert grow(shapes, longest, VISION) == shapes
    check(longest, pack(longest, shapes, VISION, patches_of))


def test_shapes_grow_for_what_they_cannot_hold_and_never_shrink():
    learner = LearnerConfig()
    small = make_groups(9, count=4, limit=5)
    shapes = plan_shapes(small, learner=learner, max_new_tokens=5, vision=VISION, tokens_per_device=64)
    rng = np.random.default_rng(1)
    large = [group(rng, i, text=200, lengths=[90, 3], grids=[(1, 20, 20)] * 3) for i in range(9)]
    with pytest.raises(UserError, match="does not fit"):
        pack(large, shapes, VISION, patches_of)
    grown = grow(shapes, large, VISION)
    check(large, pack(large, grown, VISION, patches_of))
    assert grow(grown, small, VISION) == grown
    check(small, pack(small, grown, VISION, patches_of))
    assert all(getattr(grown, f.name) >= getattr(shapes, f.name) for f in dataclasses.fields(PackShapes))


def test_rows_and_vision_rows_can_be_split_over_the_devices():
    groups = make_groups(10, count=16)
    for devices in (1, 2, 4, 8):
        sizes = dict(max_new_tokens=20, row_devices=devices, tokens_per_device=256)
        shapes = plan_shapes(groups, learner=LearnerConfig(), vision=VISION, **sizes)
        assert shapes.rows % devices == 0 and shapes.image_rows % devices == 0
        check(groups, pack(groups, shapes, VISION, patches_of))


def test_shapes_are_plain_numbers_that_a_checkpoint_can_hold():
    shapes = plan_shapes(make_groups(0), learner=LearnerConfig(), max_new_tokens=20, vision=VISION)
    assert PackShapes(**json.loads(json.dumps(dataclasses.asdict(shapes)))) == shapes


@pytest.mark.parametrize(
    "fields, words",
    [({"row_length": 40}, "learner.row_length"), ({"rows": 3}, "learner.rows"), ({"image_rows": 1}, "image_rows")],
)
def test_a_fixed_size_that_cannot_work_names_its_field(fields, words):
    rng = np.random.default_rng(0)
    groups = [group(rng, 0, text=30, lengths=[20, 20], grids=[(1, 4, 4)] * 3)]
    with pytest.raises(UserError, match=words):
        plan_shapes(groups, learner=LearnerConfig(**fields), max_new_tokens=20, vision=VISION, row_devices=2)


def test_rows_are_filled_well_by_groups_of_mixed_lengths():
    groups = make_groups(11, count=64, generations=8, limit=64, images=False)
    shapes = plan_shapes(groups, learner=LearnerConfig(), max_new_tokens=64, vision=None, tokens_per_device=2048)
    batch = pack(groups, shapes, None, patches_of)
    used = batch.high[: int(batch.micro_batches)]
    assert (used > 0).mean() > 0.8
