"""The correction for the sampler: weights worked out by hand, and against a loop over completions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmmr1_jax.algorithms.completion_sums import completion_sums
from lmmr1_jax.algorithms.importance import importance_weights
from lmmr1_jax.config.schema import AlgorithmConfig

KINDS = ("token", "sequence", "masked_token", "masked_sequence", "none")


def weights(old, sampler, completion, **config):
    given = (jnp.asarray(old, jnp.float32), jnp.asarray(sampler, jnp.float32), jnp.asarray(completion))
    weight, held_back = jax.jit(lambda *a: importance_weights(*a, AlgorithmConfig(**config)))(*given)
    return np.asarray(weight), np.asarray(held_back)


@pytest.mark.parametrize(
    "kind, expected, held_back",
    [
        # ratios 1.5, 3, 0.4 and 1.25, 1.25; products 1.8 and 1.5625; the cap is 2 and its inverse 0.5
        ("token", [1.5, 2, 0.4, 1.25, 1.25], [0, 1, 0, 0, 0]),
        ("masked_token", [1.5, 0, 0, 1.25, 1.25], [0, 1, 1, 0, 0]),
        ("sequence", [1.8, 1.8, 1.8, 1.5625, 1.5625], [0, 0, 0, 0, 0]),
        ("masked_sequence", [1.8, 1.8, 1.8, 1.5625, 1.5625], [0, 0, 0, 0, 0]),
        ("none", [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]),
    ],
)
def test_weights_equal_those_worked_out_by_hand(kind, expected, held_back):
    sampler = -np.log([[1.5, 3, 0.4, 1.25, 1.25]])
    got = weights(np.zeros((1, 5)), sampler, [[0, 0, 0, 1, 1]], importance=kind)
    np.testing.assert_allclose(got[0], [expected], rtol=1e-6)
    assert got[1].tolist() == [held_back]


def test_a_whole_completion_is_cut_or_dropped_when_its_product_lies_outside():
    sampler = -np.log([[2, 2, 0.5, 0.5, 1]])  # products 4 and 0.25 and 1
    completion = [[7, 7, 3, 3, 9]]
    cut, _ = weights(np.zeros((1, 5)), sampler, completion, importance="sequence", importance_cap=3.0)
    np.testing.assert_allclose(cut, [[3, 3, 0.25, 0.25, 1]], rtol=1e-6)
    dropped, held_back = weights(np.zeros((1, 5)), sampler, completion, importance="masked_sequence")
    np.testing.assert_allclose(dropped, [[0, 0, 0, 0, 1]], rtol=1e-6)
    assert held_back.tolist() == [[1, 1, 1, 1, 0]]


@pytest.mark.parametrize("kind", KINDS)
def test_random_weights_equal_a_loop_over_completions(kind):
    rng = np.random.default_rng(0)
    completion = np.array([[4, 4, 4, 0, 0, -1], [2, 3, 3, 3, -1, -1], [-1] * 6, [1, 1, 1, 1, 1, 1]])
    old, sampler = rng.normal(size=(2, 4, 6))
    got, _ = weights(old, sampler, completion, importance=kind, importance_cap=1.7)
    for number in range(5):
        for slot in zip(*np.nonzero(completion == number), strict=True):
            ratio = np.exp(old[slot] - sampler[slot])
            if "sequence" in kind:
                ratio = np.exp((old - sampler)[completion == number].sum())
            if kind == "none":
                ratio = 1.0
            elif "masked" in kind:
                ratio = ratio if 1 / 1.7 <= ratio <= 1.7 else 0.0
            np.testing.assert_allclose(got[slot], min(ratio, 1.7), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_flows_through_the_weights_and_none_is_infinite(kind):
    def total(old):
        return importance_weights(
            old, jnp.zeros_like(old), jnp.array([[0, 0, 1]]), AlgorithmConfig(importance=kind)
        )[0].sum()

    value, gradient = jax.value_and_grad(total)(jnp.array([[500.0, 0.1, -500.0]]))
    assert np.isfinite(value) and (gradient == 0).all()


def test_sums_stay_within_their_completion_and_padding_is_not_read():
    values = jnp.array([[1, 2, 3, 4, 5, jnp.nan], [1, jnp.inf, 1, 1, 1, 1]])
    completion = jnp.array([[0, 0, 0, 4, 4, -1], [8, -1, -1, -1, -1, -1]])
    assert completion_sums(values, completion).tolist() == [[6, 6, 6, 9, 9, 0], [1, 0, 0, 0, 0, 0]]
