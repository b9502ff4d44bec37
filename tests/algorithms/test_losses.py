"""The clipped loss and the KL estimators against numbers worked out by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmmr1_jax.algorithms.kl import kl_per_token
from lmmr1_jax.algorithms.losses import LossInputs, clipped_policy_loss
from lmmr1_jax.config import AlgorithmConfig


@pytest.mark.parametrize(
    "estimator, expected",
    [
        ("k1", [-0.5, 0, 0.5, 1]),
        ("k2", [0.125, 0, 0.125, 0.5]),
        ("k3", [0.148721, 0, 0.106531, 0.367879]),
    ],
)
def test_kl_estimators_equal_their_formulas(estimator, expected):
    d = np.array([-0.5, 0, 0.5, 1], np.float32)
    np.testing.assert_allclose(kl_per_token(d, estimator), expected, atol=1e-6)
    np.testing.assert_allclose(jax.jit(lambda x: kl_per_token(x, estimator))(d), expected, atol=1e-6)


def test_k3_of_a_collapsed_token_is_finite_with_a_finite_gradient():
    value, gradient = jax.value_and_grad(lambda d: kl_per_token(d, "k3"))(jnp.float32(-500.0))
    assert np.isfinite(value) and np.isfinite(gradient)


def inputs(log_ratio, advantages, mask=None, total=None, reference=None):
    log_ratio = jnp.asarray(log_ratio, jnp.float32)
    mask = jnp.ones_like(log_ratio) if mask is None else jnp.asarray(mask, jnp.float32)
    total = mask.sum() if total is None else jnp.float32(total)
    zeros = jnp.zeros_like(log_ratio)
    return LossInputs(
        log_probs=log_ratio,
        old_log_probs=zeros,
        sampler_log_probs=zeros,
        reference_log_probs=reference,
        advantages=jnp.asarray(advantages, jnp.float32),
        mask=mask,
        completion=jnp.where(mask > 0, 0, -1),
        tokens_total=total,
    )


def test_ratio_is_clipped_only_where_that_makes_the_objective_smaller():
    ratios = np.log([[1.5, 1.5, 0.5, 0.5]])
    # A=+1, 1.5 -> 1.2; A=-1, 1.5 -> -1.5; A=+1, 0.5 -> 0.5; A=-1, 0.5 -> -0.8
    out = clipped_policy_loss(inputs(ratios, [[1, -1, 1, -1]]), AlgorithmConfig())
    np.testing.assert_allclose(out.loss, -(1.2 - 1.5 + 0.5 - 0.8) / 4, atol=1e-6)
    np.testing.assert_allclose(out.metrics["clip_fraction"], 0.5)


def test_tokens_weigh_alike_whatever_their_completion():
    # A: three tokens of advantage 1, B: one of -1: -(3 - 1) / 4 = -0.5, where a mean over sequences would be 0.
    out = clipped_policy_loss(inputs(np.zeros((1, 4)), [[1, 1, 1, -1]]), AlgorithmConfig())
    np.testing.assert_allclose(out.loss, -0.5)


def test_shares_of_micro_batches_add_up_to_the_loss_of_the_minibatch():
    rng = np.random.default_rng(0)
    ratio, advantages = rng.normal(size=(2, 4, 5)) * 0.3
    mask = rng.integers(0, 2, size=(4, 5))
    whole = clipped_policy_loss(inputs(ratio, advantages, mask), AlgorithmConfig()).loss
    parts = [
        clipped_policy_loss(inputs(ratio[a:b], advantages[a:b], mask[a:b], mask.sum()), AlgorithmConfig()).loss
        for a, b in ((0, 1), (1, 4))
    ]
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-6)


def test_padding_takes_no_part_even_when_it_is_infinite():
    config = AlgorithmConfig(kl_coefficient=0.5, kl_placement="loss")

    def loss(log_probs):
        given = inputs(log_probs, [[1.0, 5.0]], mask=[[1, 0]], reference=jnp.zeros((1, 2)))
        return clipped_policy_loss(given, config).loss

    value, gradient = jax.value_and_grad(loss)(jnp.array([[0.1, -jnp.inf]]))
    assert np.isfinite(value)
    assert gradient[0, 1] == 0


def test_kl_joins_the_loss_only_when_it_is_placed_there():
    reference = jnp.array([[-0.5, 0.5]])
    d = np.array([[0.5, -0.5]])
    for placement, added in (("loss", 0.1 * 0.125), ("reward", 0.0)):
        config = AlgorithmConfig(kl_coefficient=0.1, kl_estimator="k2", kl_placement=placement)
        given = inputs(np.zeros((1, 2)), np.zeros((1, 2)), reference=reference)
        out = clipped_policy_loss(given, config)
        np.testing.assert_allclose(out.loss, added, atol=1e-7)
        np.testing.assert_allclose(out.metrics["kl"], np.mean(d**2) / 2, atol=1e-7)


def test_on_policy_gradient_is_minus_the_advantage_over_the_tokens():
    advantages = jnp.array([[2.0, -1.0, 0.5]])

    def loss(log_probs):
        given = inputs(log_probs, advantages)
        old = jax.lax.stop_gradient(log_probs)
        given = dataclasses.replace(given, old_log_probs=old, sampler_log_probs=old)
        return clipped_policy_loss(given, AlgorithmConfig()).loss

    gradient = jax.grad(loss)(jnp.array([[-1.0, -7.0, -0.1]]))
    np.testing.assert_allclose(gradient, -advantages / 3, rtol=1e-6)
