"""Drawing from logits: the distribution is softmax's own, whatever the vocabulary's size and shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmmr1_jax.rollout.local.draw import block_size, draw_tokens, most_probable_tokens


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def draw_many(logits: np.ndarray, count: int, **truncation) -> tuple[np.ndarray, np.ndarray]:
    """`count` draws from one row of logits, as a batch of equal rows."""
    uniforms = jax.random.uniform(jax.random.key(7), (2, count))
    rows = jnp.broadcast_to(jnp.asarray(logits)[:, None], (len(logits), count))
    tokens, log_probs = jax.jit(lambda x, u: draw_tokens(x, u, **truncation))(rows, uniforms)
    return np.asarray(tokens), np.asarray(log_probs)


def chi_square(tokens: np.ndarray, probabilities: np.ndarray) -> float:
    """Pearson's statistic in standard deviations from its mean, over the ids that can be drawn."""
    possible = probabilities > 0
    expected = probabilities[possible] * len(tokens)
    counts = np.bincount(tokens, minlength=len(probabilities))
    assert counts[~possible].sum() == 0
    degrees = possible.sum() - 1
    return (((counts[possible] - expected) ** 2 / expected).sum() - degrees) / np.sqrt(2 * degrees)


@pytest.mark.parametrize("vocabulary", [2, 7, 64, 96, 211])
def test_draws_follow_softmax(vocabulary):
    logits = np.random.default_rng(vocabulary).normal(size=vocabulary).astype(np.float32)
    tokens, log_probs = draw_many(logits, 100_000)
    probabilities = softmax(logits)
    assert chi_square(tokens, probabilities) < 5
    np.testing.assert_allclose(log_probs, np.log(probabilities)[tokens], atol=1e-5)


def test_excluded_ids_are_never_drawn_and_have_no_mass():
    logits = np.random.default_rng(0).normal(size=60).astype(np.float32)
    logits[[0, 1, 13, 58, 59]] = -np.inf
    tokens, log_probs = draw_many(logits, 50_000)
    probabilities = softmax(logits)
    assert chi_square(tokens, probabilities) < 5
    np.testing.assert_allclose(log_probs, np.log(probabilities[tokens]), atol=1e-5)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-23])
def test_the_ends_of_the_unit_interval_reach_the_first_and_last_possible_id(uniform):
    logits = np.zeros((64, 1), np.float32)
    logits[:9] = logits[-11:] = -np.inf
    tokens, _ = draw_tokens(jnp.asarray(logits), jnp.full((2, 1), uniform, jnp.float32))
    assert tokens[0] == (9 if uniform == 0 else 52)


def test_a_row_with_one_possible_id_draws_it():
    logits = np.full((151_936 // 8, 3), -np.inf, np.float32)
    logits[[5, 777, 18_000], [0, 1, 2]] = -3.0
    tokens, log_probs = draw_tokens(jnp.asarray(logits), jnp.full((2, 3), 0.999, jnp.float32))
    assert tokens.tolist() == [5, 777, 18_000]
    np.testing.assert_array_equal(log_probs, 0)


def test_rare_ids_of_a_large_vocabulary_get_their_share():
    # Half of the mass lies in 151,935 ids of 3.3e-6 each: they must be drawn half of the time, all over the place.
    vocabulary, draws = 151_936, 64
    logits = np.zeros(vocabulary, np.float32)
    logits[77] = np.log(vocabulary - 1)
    tokens, log_probs = draw_many(logits, draws)
    rare = tokens[tokens != 77]
    assert 16 < len(rare) < 48
    assert len(set(rare.tolist())) == len(rare) and rare.min() < vocabulary / 4 and rare.max() > 3 * vocabulary / 4
    np.testing.assert_allclose(log_probs[tokens == 77], np.log(0.5), atol=1e-5)


def test_top_k_keeps_the_k_most_probable():
    logits = np.random.default_rng(1).normal(size=50).astype(np.float32)
    tokens, log_probs = draw_many(logits, 50_000, top_k=5)
    kept = np.argsort(-logits)[:5]
    probabilities = np.zeros(50)
    probabilities[kept] = softmax(logits[kept])
    assert chi_square(tokens, probabilities) < 5
    np.testing.assert_allclose(log_probs, np.log(softmax(logits))[tokens], atol=1e-5)


def test_top_p_keeps_the_smallest_set_with_that_mass():
    probabilities = np.array([0.05, 0.4, 0.02, 0.3, 0.2, 0.03])
    tokens, log_probs = draw_many(np.log(probabilities).astype(np.float32), 20_000, top_p=0.75)
    assert set(tokens.tolist()) == {1, 3, 4}  # 0.4 + 0.3 is not yet 0.75
    assert chi_square(tokens, np.array([0, 4, 0, 3, 2, 0]) / 9) < 5
    np.testing.assert_allclose(log_probs, np.log(probabilities)[tokens], atol=1e-5)
    assert set(draw_many(np.log(probabilities).astype(np.float32), 20_000, top_p=0.65)[0].tolist()) == {1, 3}


def test_top_p_counts_within_what_top_k_left():
    probabilities = np.array([0.4, 0.3, 0.2, 0.1])
    tokens, _ = draw_many(np.log(probabilities).astype(np.float32), 5_000, top_k=3, top_p=0.75)
    assert set(tokens.tolist()) == {0, 1}  # 0.7 of 0.9 is more than 0.75


def test_the_most_probable_id_is_the_lowest_of_those_that_tie():
    logits = np.random.default_rng(2).normal(size=(96, 40)).astype(np.float32)
    logits[[90, 31, 30], 3] = 9.0
    logits[95, 4] = 9.0
    tokens, log_probs = jax.jit(most_probable_tokens)(jnp.asarray(logits))
    assert tokens.tolist() == logits.argmax(0).tolist()
    expected = [np.log(softmax(logits[:, row]).max()) for row in range(40)]
    np.testing.assert_allclose(log_probs, expected, atol=1e-5)


def test_blocks_of_the_real_vocabularies_are_near_their_square_root():
    assert block_size(151_936) == 128 and block_size(152_064) == 384 and block_size(512) == 16
