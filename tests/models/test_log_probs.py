"""Chunked log-probs and their gradient against the dense formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmmr1_jax.models.log_probs import token_log_probs

ROWS, TOKENS, WIDTH, VOCABULARY = 3, 7, 8, 37


def dense(hidden, embedding, targets, banned, temperature):
    """The formula over the allowed tokens alone; they are the last ones of the vocabulary."""
    first = 0 if banned is None else 4
    log_p = jax.nn.log_softmax(hidden @ embedding[first:].T / temperature)
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, -1)
    return jnp.take_along_axis(log_p, targets[..., None] - first, -1)[..., 0], entropy


def arrays(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    hidden = jax.random.normal(keys[0], (ROWS, TOKENS, WIDTH))
    embedding = jax.random.normal(keys[1], (VOCABULARY, WIDTH))
    return hidden, embedding, jax.random.randint(keys[2], (ROWS, TOKENS), 5, VOCABULARY)


@pytest.mark.parametrize(
    ("chunk", "block", "temperature", "with_ban"),
    [(9, 8, 1.0, False), (9, 64, 0.6, True), (1000, 8, 0.6, True), (1, 37, 1.0, True)],
)
def test_chunked_values_and_gradients_equal_the_dense_ones(block, chunk, temperature, with_ban, monkeypatch):
    monkeypatch.setattr("lmmr1_jax.models.log_probs.CPU_VOCABULARY", block)
    hidden, embedding, targets = arrays()
    banned = jnp.arange(VOCABULARY) < 4 if with_ban else None
    weights = jax.random.normal(jax.random.key(9), (2, ROWS, TOKENS))

    def loss(log_probs_of, hidden, embedding):
        log_probs, entropy = log_probs_of(hidden, embedding)
        return jnp.sum(weights[0] * log_probs + weights[1] * entropy), (log_probs, entropy)

    def chunked(h, e):
        return token_log_probs(h, e, targets, banned=banned, temperature=temperature, chunk=chunk)

    grad = jax.grad(loss, argnums=(1, 2), has_aux=True)
    ours, values = jax.jit(lambda h, e: grad(chunked, h, e))(hidden, embedding)
    oracle = jax.jit(lambda h, e: grad(lambda h, e: dense(h, e, targets, banned, temperature), h, e))
    theirs, expected = oracle(hidden, embedding)
    for a, b in zip(jax.tree.leaves((ours, values)), jax.tree.leaves((theirs, expected)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()), rtol=0)


def test_a_tied_table_gets_both_gradients():
    _, embedding, targets = arrays()

    def loss(log_probs_of, table):
        hidden = jnp.tanh(table[(targets + 1) % VOCABULARY])
        return jnp.sum(log_probs_of(hidden, table)[0] ** 2)

    def chunked(hidden, table):
        return token_log_probs(hidden, table, targets, banned=None, temperature=1.0, chunk=6)

    ours = jax.jit(jax.grad(lambda t: loss(chunked, t)))
    theirs = jax.jit(jax.grad(lambda t: loss(lambda h, e: dense(h, e, targets, None, 1.0), t)))
    np.testing.assert_allclose(ours(embedding), theirs(embedding), atol=2e-4)


def test_banned_tokens_have_no_probability_and_no_gradient():
    hidden, embedding, targets = arrays()
    banned = jnp.arange(VOCABULARY) < 4

    def loss(embedding):
        return sum(
            part.sum() for part in token_log_probs(hidden, embedding, targets, banned=banned, temperature=1.0, chunk=6)
        )

    assert not np.any(jax.jit(jax.grad(loss))(embedding)[:4])
    log_probs, _ = token_log_probs(hidden, embedding, targets * 0, banned=banned, temperature=1.0, chunk=6)
    assert not np.any(np.exp(log_probs))


def test_a_uniform_policy_has_the_entropy_of_its_allowed_tokens():
    hidden, targets = jnp.zeros((1, 2, WIDTH)), jnp.array([[5, 6]])
    banned = jnp.arange(VOCABULARY) < 5
    log_probs, entropy = token_log_probs(hidden, arrays()[1], targets, banned=banned, temperature=0.5, chunk=2)
    np.testing.assert_allclose(log_probs, -np.log(32), rtol=1e-6)
    np.testing.assert_allclose(entropy, np.log(32), rtol=1e-6)


def test_no_array_of_all_logits_is_ever_made():
    hidden, embedding, targets = arrays()

    def loss(hidden, embedding):
        return token_log_probs(hidden, embedding, targets, banned=None, temperature=1.0, chunk=3)[0].sum()

    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, embedding).as_text()
    assert f"{ROWS}x{TOKENS}x{VOCABULARY}xf32" not in text and f"{ROWS * TOKENS}x{VOCABULARY}xf32" not in text


def test_bfloat16_states_give_float32_results_near_the_float32_ones():
    hidden, embedding, targets = arrays()
    exact = token_log_probs(hidden, embedding, targets, banned=None, temperature=1.0, chunk=6)
    rough = token_log_probs(hidden.astype(jnp.bfloat16), embedding, targets, banned=None, temperature=1.0, chunk=6)
    for a, b in zip(rough, exact, strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, atol=0.1)
