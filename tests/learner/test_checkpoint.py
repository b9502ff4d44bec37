"""Checkpoints: the same bits back, whole or not at all, and only those that are wanted."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmmr1_jax.learner.checkpoint import Checkpoints
from lmmr1_jax.learner.state import POLICY, TrainableState, TrainState
from lmmr1_jax.runtime.errors import UserError


def state(seed=0, width=5):
    trees = [{"language": {"a": {"kernel": jax.random.normal(jax.random.key(seed + i), (3, width))}}} for i in range(3)]
    moments = optax.ScaleByAdamState(jnp.int32(seed + 7), trees[1], trees[2])
    trained = {POLICY: TrainableState(trees[0], (optax.EmptyState(), moments))}
    return TrainState(trained, jnp.int32(seed + 9), jnp.int32(1))


def abstract(given):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), given)


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture
def checkpoints(tmp_path):
    made = Checkpoints(tmp_path / "checkpoints", keep=2)
    yield made
    made.close()


def test_restored_state_has_the_same_bits_and_extras(checkpoints):
    extras = {"cursor": {"epoch": 2, "index": 5}, "seed": 2**65, "offsets": [1, 2], "none": None}
    checkpoints.save(3, state(), extras)
    checkpoints.wait()
    step, restored, found = checkpoints.restore_newest(abstract(state()))
    assert step == 3 and found == extras
    assert_same_bits(restored, state())


def test_an_update_that_donates_the_state_does_not_reach_the_checkpoint_being_written(checkpoints):
    params = {"language": {"kernel": jnp.arange(1 << 20, dtype=jnp.float32)}}
    given = TrainState({POLICY: TrainableState(params, optax.EmptyState())}, jnp.int32(3), jnp.int32(0))
    expected = jax.tree.map(np.array, given)
    checkpoints.save(1, given, {})
    spoil = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    jax.block_until_ready(spoil(given))
    checkpoints.wait()
    _, restored, _ = checkpoints.restore_newest(abstract(expected_on_device(expected)))
    assert_same_bits(restored, expected)


def expected_on_device(tree):
    return jax.tree.map(jnp.asarray, tree)


def test_the_newest_and_the_best_are_kept(checkpoints):
    for step, score in ((1, 0.1), (2, 0.9), (3, None), (4, 0.5), (5, None)):
        checkpoints.save(step, state(step), {}, score=score)
    checkpoints.wait()
    assert checkpoints.steps() == [2, 4, 5]
    again = Checkpoints(checkpoints.folder, keep=1)  # a resumed run knows the scores from the disk
    again.save(6, state(6), {})
    again.close()
    assert again.steps() == [2, 6]


def test_half_written_checkpoints_are_ignored_and_removed(checkpoints):
    checkpoints.save(1, state(), {})
    checkpoints.wait()
    half = checkpoints.folder / "2.orbax-checkpoint-tmp"
    shutil.copytree(checkpoints.folder / "1", half)
    assert checkpoints.steps() == [1]
    Checkpoints(checkpoints.folder, keep=2).close()
    assert not half.exists()


def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(checkpoints, caplog):
    for step in (1, 2):
        checkpoints.save(step, state(step), {"step": step})
    checkpoints.wait()
    damage(checkpoints.folder / "2")
    step, restored, extras = checkpoints.restore_newest(abstract(state()))
    assert step == 1 and extras == {"step": 1}
    assert_same_bits(restored, state(1))
    assert "can't be read" in caplog.text
    checkpoints.save(2, state(2), {"step": 2})  # the run comes past that step again
    checkpoints.wait()
    assert checkpoints.restore_newest(abstract(state()))[0] == 2


def test_a_damaged_checkpoint_never_pushes_out_the_one_that_a_run_goes_on_from(checkpoints):
    for step in (1, 2):
        checkpoints.save(step, state(step), {})
    checkpoints.wait()
    damage(checkpoints.folder / "2")
    again = Checkpoints(checkpoints.folder, keep=1)
    assert again.restore_newest(abstract(state()))[0] == 1
    again.close()  # a run that is killed before its next checkpoint has to find this one
    assert 1 in again.steps()


def damage(folder):
    for path in (folder / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_nothing_to_restore_is_none_and_nothing_readable_is_an_error(checkpoints):
    assert checkpoints.restore_newest(abstract(state())) is None
    checkpoints.save(1, state(), {})
    checkpoints.wait()
    damage(checkpoints.folder / "1")
    with pytest.raises(UserError, match="none of the checkpoints"):
        checkpoints.restore_newest(abstract(state()))


def test_a_checkpoint_of_another_model_is_an_error_and_never_cut_to_fit(checkpoints):
    checkpoints.save(1, state(width=5), {})
    checkpoints.wait()
    with pytest.raises(UserError, match="none of the checkpoints"):
        checkpoints.restore_newest(abstract(state(width=4)))
