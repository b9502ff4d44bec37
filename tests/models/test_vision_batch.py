"""Geometry of vision rows: what is where, worked out by hand."""

import numpy as np
import pytest

from lmmr1_jax.models.vision_batch import pack_images, slots_needed, unit_places
from weights_bridge.architecture import VisionConfig


def tower(window_size: int | None) -> VisionConfig:
    return VisionConfig(2, 16, 16, 2, 14, 2, 2, 3, window_size, (1,), 32, "silu", 2)


def marked(grid, mark: float) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Patches whose first value is `mark` plus their index."""
    patches = np.zeros((int(np.prod(grid)), 1176), np.float32)
    patches[:, 0] = mark + np.arange(len(patches))
    return patches, grid


def test_units_stand_window_by_window_each_at_its_own_place():
    # 3 x 5 merged tokens in windows of 4 x 4: the fifth column opens window 1.
    expected = [0, 1, 2, 3, 16, 4, 5, 6, 7, 20, 8, 9, 10, 11, 24]
    np.testing.assert_array_equal(unit_places((1, 6, 10), tower(112)), expected)
    assert slots_needed((1, 6, 10), tower(112)) == 128
    assert slots_needed((1, 6, 10), tower(None)) == 60


@pytest.mark.parametrize("window", [None, 112, 84])
def test_every_merged_token_finds_its_own_four_patches(window):
    config = tower(window)
    grids = [(1, 6, 10), (1, 2, 2), (3, 8, 4), (1, 14, 6)]
    images = [marked(grid, 1000.0 * (i + 1)) for i, grid in enumerate(grids)]
    slots = 8 * config.window_slots if window else 144
    batch, token_slots = pack_images(images, config, slots=slots)
    merged = batch.patches[..., 0].reshape(-1, 4)
    for i, (grid, places) in enumerate(zip(grids, token_slots, strict=True)):
        assert len(places) == np.prod(grid) // 4
        np.testing.assert_array_equal(merged[places].reshape(-1), 1000.0 * (i + 1) + np.arange(np.prod(grid)))
    assert (batch.high > 0).sum() == sum(int(np.prod(g)) for g in grids)
    assert not batch.patches[batch.high == 0].any()


def test_every_patch_is_seen_by_its_frames_slots():
    config = tower(112)
    batch, _ = pack_images([marked((2, 8, 8), 0), marked((1, 4, 4), 0), marked((1, 8, 8), 0)], config, slots=192)
    first, small = [(0, 64)] * 64 + [(64, 128)] * 64, [(128, 192), (0, 0)]
    assert list(zip(batch.low[0], batch.high[0], strict=True))[:128] == first
    assert sorted(set(zip(batch.low[0, 128:], batch.high[0, 128:], strict=True)), reverse=True) == small
    assert (batch.high[0, 128:] > 0).sum() == 16
    assert list(zip(batch.low[1], batch.high[1], strict=True)) == [(0, 64)] * 64 + [(0, 0)] * 128


def test_coordinates_follow_the_merge_units():
    config = tower(None)
    batch, _ = pack_images([marked((1, 4, 4), 0)], config, slots=16)
    expected = [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]
    np.testing.assert_array_equal(batch.coordinates[0, :8], expected)


def test_images_go_to_the_first_row_with_room():
    config = tower(112)
    images = [marked((1, 8, 8), 1), marked((1, 8, 16), 100), marked((1, 8, 8), 1000)]
    batch, token_slots = pack_images(images, config, slots=128, rows=3)
    assert batch.patches.shape == (3, 128, 1176)
    assert [int(places[0]) for places in token_slots] == [0, 32, 16]
    assert not batch.high[2].any()


def test_what_does_not_fit_is_an_error():
    config = tower(112)
    with pytest.raises(ValueError, match="needs 256 slots"):
        pack_images([marked((1, 16, 16), 0)], config, slots=128)
    with pytest.raises(ValueError, match="need 2 vision rows"):
        pack_images([marked((1, 8, 8), 0)] * 2, config, slots=64, rows=1)
    with pytest.raises(ValueError, match="multiple of 64"):
        pack_images([], config, slots=100)
