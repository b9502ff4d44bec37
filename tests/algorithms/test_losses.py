"""Losses and the KL against numbers worked out by hand, and every loss, gradient included, against slow loops."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from algorithms.rewarded import settings

from lmmr1_jax.algorithms.kl import adapted_coefficient, kl_per_token
from lmmr1_jax.algorithms.loss_inputs import LossInputs
from lmmr1_jax.algorithms.losses import loss, token_shares


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


@pytest.mark.parametrize("kl, expected", [(0.05, 0.0097952), (0.1, 0.01), (0.11, 0.0101024), (0.2, 0.0102048)])
def test_the_coefficient_is_steered_by_at_most_a_fifth_of_the_error(kl, expected):
    got = adapted_coefficient(0.01, kl, target=0.1, horizon=10_000, completions=1024)
    assert got == pytest.approx(expected, rel=1e-9)


def test_a_kl_that_is_no_number_leaves_the_coefficient_alone_and_none_becomes_negative():
    assert adapted_coefficient(0.01, math.nan, target=0.1, horizon=10_000, completions=1024) == 0.01
    assert adapted_coefficient(0.01, 0.0, target=0.1, horizon=1, completions=1024) == pytest.approx(0.008)


def inputs(log_ratio, advantages, mask=None, completion=None, **more):
    log_ratio = jnp.asarray(log_ratio, jnp.float32)
    mask = jnp.ones_like(log_ratio) if mask is None else jnp.asarray(mask, jnp.float32)
    completion = jnp.where(mask > 0, 0 if completion is None else jnp.asarray(completion), -1)
    zeros = jnp.zeros_like(log_ratio)
    given = dict(
        log_probs=log_ratio,
        entropy=zeros,
        old_log_probs=zeros,
        sampler_log_probs=zeros,
        reference_log_probs=None,
        advantages=jnp.asarray(advantages, jnp.float32),
        mask=mask,
        completion=completion,
        tokens_total=mask.sum(),
        completions_total=jnp.float32(len(set(np.unique(completion).tolist()) - {-1})),
        kl_coefficient=jnp.float32(0.0),
    )
    return LossInputs(**(given | more))


def test_ratio_is_clipped_only_where_that_makes_the_objective_smaller():
    ratios = np.log([[1.5, 1.5, 0.5, 0.5]])
    # A=+1, 1.5 -> 1.2; A=-1, 1.5 -> -1.5; A=+1, 0.5 -> 0.5; A=-1, 0.5 -> -0.8
    out = loss(inputs(ratios, [[1, -1, 1, -1]]), settings())
    np.testing.assert_allclose(out.loss, -(1.2 - 1.5 + 0.5 - 0.8) / 4, atol=1e-6)
    np.testing.assert_allclose(out.metrics["clip_fraction"], 0.5)


def test_the_bounds_of_the_ratio_are_apart():
    # A=+1, 1.5 -> 1.28; A=-1, 0.5 -> -0.9
    out = loss(inputs(np.log([[1.5, 0.5]]), [[1, -1]]), settings(clip_low=0.1, clip_high=0.28))
    np.testing.assert_allclose(out.loss, -(1.28 - 0.9) / 2, atol=1e-6)


def test_the_dual_clip_bounds_the_loss_where_the_advantage_is_negative():
    # A=-1: 5 would cost 5, and costs 3; 2 costs 2; A=+1: 5 -> 1.2 as ever
    out = loss(inputs(np.log([[5, 2, 5]]), [[-1, -1, 1]]), settings(dual_clip=3.0))
    np.testing.assert_allclose(out.loss, (3 + 2 - 1.2) / 3, atol=1e-6)
    np.testing.assert_allclose(out.metrics["clip_fraction"], 2 / 3, rtol=1e-6)


def test_gspo_has_one_ratio_for_a_completion():
    # ratios 2 and 0.5 have the mean 1 and nothing is clipped; 1.1 and 1.1 is clipped to 1.0004 for both tokens
    given = inputs(np.log([[2, 0.5, 1.1, 1.1]]), np.ones((1, 4)), completion=[[0, 0, 1, 1]])
    out = loss(given, settings("gspo"))
    np.testing.assert_allclose(out.loss, -(1 + 1.0004) / 2, atol=1e-6)
    np.testing.assert_allclose(out.metrics["clip_fraction"], 0.5)


def test_cispo_clips_the_weight_and_keeps_the_gradient():
    advantages = jnp.array([[1.0, 1.0, -1.0]])
    config = settings("cispo", clip_low=0.5, clip_high=1.0)
    gradient = jax.grad(lambda lp: loss(inputs(lp, advantages), config).loss)(jnp.log(jnp.array([[3.0, 1.5, 0.1]])))
    np.testing.assert_allclose(gradient, [[-2 / 3, -1.5 / 3, 0.5 / 3]], rtol=1e-6)


@pytest.mark.parametrize(
    "aggregation, expected",
    [
        # A: three tokens of advantage 1, B: one of -1
        ("token", -(3 - 1) / 4),
        ("sequence", 0.0),
        ("constant", -(3 - 1) / (2 * 8)),
    ],
)
def test_tokens_are_averaged_as_the_config_says(aggregation, expected):
    given = inputs(np.zeros((1, 4)), [[1, 1, 1, -1]], completion=[[0, 0, 0, 1]])
    np.testing.assert_allclose(loss(given, settings(aggregation=aggregation)).loss, expected, atol=1e-7)


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_the_shares_of_a_minibatch_add_up_to_one(aggregation):
    given = inputs(np.zeros((2, 3)), np.zeros((2, 3)), [[1, 1, 1], [1, 0, 0]], [[4, 4, 2], [0, 0, 0]])
    np.testing.assert_allclose(token_shares(given, settings(aggregation=aggregation)).sum(), 1.0, rtol=1e-6)


def test_padding_takes_no_part_even_when_it_is_infinite():
    for name in ("grpo", "gspo", "cispo"):
        config = settings(name, kl_coefficient=0.5, entropy_bonus=0.1, importance="sequence")

        def total(log_probs, config=config):
            more = dict(reference_log_probs=jnp.zeros((1, 2)), kl_coefficient=jnp.float32(0.5), entropy=-log_probs)
            return loss(inputs(log_probs, [[1.0, 5.0]], mask=[[1, 0]], **more), config).loss

        value, gradient = jax.value_and_grad(total)(jnp.array([[0.1, -jnp.inf]]))
        assert np.isfinite(value)
        assert np.isfinite(gradient).all() and gradient[0, 1] == 0


def test_kl_joins_the_loss_only_when_it_is_placed_there():
    d = np.array([[0.5, -0.5]])
    for placement, added in (("loss", 0.1 * 0.125), ("reward", 0.0)):
        config = settings(kl_coefficient=0.1, kl_estimator="k2", kl_placement=placement)
        given = inputs(
            np.zeros((1, 2)), np.zeros((1, 2)), reference_log_probs=jnp.asarray(-d), kl_coefficient=jnp.float32(0.1)
        )
        out = loss(given, config)
        np.testing.assert_allclose(out.loss, added, atol=1e-7)
        np.testing.assert_allclose(out.metrics["kl"], np.mean(d**2) / 2, atol=1e-7)


@pytest.mark.parametrize("kind", ["clip", "gspo", "cispo", "policy_gradient"])
def test_on_policy_gradient_is_minus_the_advantage_over_the_tokens(kind):
    advantages = jnp.array([[2.0, -1.0, 0.5]])

    def total(log_probs):
        old = jax.lax.stop_gradient(log_probs)
        given = inputs(log_probs, advantages, old_log_probs=old, sampler_log_probs=old)
        return loss(given, settings(loss=kind)).loss

    gradient = jax.grad(total)(jnp.array([[-1.0, -7.0, -0.1]]))
    # GSPO's ratio belongs to the whole completion, its gradient to each token by its own advantage.
    np.testing.assert_allclose(gradient, -advantages / 3, rtol=1e-6)


COMPLETION = np.array([[4, 4, 4, 0, 0, -1], [2, 3, 3, 3, -1, -1], [-1] * 6, [1, 1, 1, 1, 1, 1]])
MASK = COMPLETION >= 0


def random_inputs(seed=0):
    rng = np.random.default_rng(seed)
    old = rng.normal(-2, 1, COMPLETION.shape)
    advantages = rng.normal(size=5)[COMPLETION]  # one for each completion
    arrays = dict(
        log_probs=old + rng.normal(0, 0.4, old.shape),
        entropy=rng.uniform(0.5, 2, old.shape),
        old_log_probs=old,
        sampler_log_probs=old + rng.normal(0, 0.4, old.shape),
        reference_log_probs=old + rng.normal(0, 0.4, old.shape),
        advantages=advantages,
    )
    given = {name: np.where(MASK, array, 0.0) for name, array in arrays.items()}
    return LossInputs(
        **{name: jnp.asarray(array, jnp.float32) for name, array in given.items()},
        mask=jnp.asarray(MASK, jnp.float32),
        completion=jnp.asarray(COMPLETION),
        tokens_total=jnp.float32(MASK.sum()),
        completions_total=jnp.float32(5),
        kl_coefficient=jnp.float32(0.3),
    )


def slow_loss(given, config, log_probs, entropy, frozen):
    """Completion by completion in float64. `frozen` are the log-probs where no gradient is to flow."""
    old, sampler, reference, advantages = (
        np.asarray(getattr(given, name), np.float64)
        for name in ("old_log_probs", "sampler_log_probs", "reference_log_probs", "advantages")
    )
    low, high, cap = config.clip_low, config.clip_high, config.importance_cap
    total = 0.0
    for number in range(5):
        slots = list(zip(*np.nonzero(COMPLETION == number), strict=True))
        n = len(slots)
        share = {"token": 1 / MASK.sum(), "sequence": 1 / (5 * n), "constant": 1 / (5 * 8)}[config.aggregation]
        mean_ratio = np.exp(sum(log_probs[s] - old[s] for s in slots) / n)
        product = np.exp(sum(old[s] - sampler[s] for s in slots))
        for s in slots:
            a = advantages[s]
            if config.loss in ("clip", "gspo"):
                ratio = np.exp(log_probs[s] - old[s])
                if config.loss == "gspo":
                    ratio = mean_ratio
                    if config.importance.endswith("token"):  # weights within a completion differ: GSPO-token
                        ratio = np.exp(sum(frozen[u] - old[u] for u in slots) / n + log_probs[s] - frozen[s])
                objective = min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a)
                if config.dual_clip and a < 0:
                    objective = max(objective, config.dual_clip * a)
            elif config.loss == "cispo":
                objective = min(max(np.exp(frozen[s] - old[s]), 1 - low), 1 + high) * a * log_probs[s]
            else:
                objective = a * log_probs[s]
            weight = product if "sequence" in config.importance else np.exp(old[s] - sampler[s])
            if config.importance == "none":
                weight = 1.0
            elif config.importance.startswith("masked"):
                weight = weight if 1 / cap <= weight <= cap else 0.0
            d = log_probs[s] - reference[s]
            kl = {"k1": d, "k2": d * d / 2, "k3": np.exp(-d) - 1 + d}[config.kl_estimator]
            kl = 0.3 * kl if config.kl_placement == "loss" else 0.0
            total += share * (-min(weight, cap) * objective + kl - config.entropy_bonus * entropy[s])
    return total


@pytest.mark.parametrize("kind", ["clip", "dual", "gspo", "cispo", "policy_gradient"])
@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
@pytest.mark.parametrize("importance", ["token", "sequence", "masked_token", "masked_sequence", "none"])
def test_every_loss_and_its_gradient_equal_the_loop_over_completions(kind, aggregation, importance):
    own = dict(loss=kind, clip_low=0.2, clip_high=0.3)
    if kind == "dual":
        own |= dict(loss="clip", dual_clip=1.3)
    estimator = {"token": "k3", "sequence": "k2", "constant": "k1"}[aggregation]
    config = settings(
        aggregation=aggregation, importance=importance, entropy_bonus=0.05, kl_coefficient=0.3,
        kl_placement="reward" if importance == "none" else "loss", kl_estimator=estimator, **own,
    )  # fmt: skip
    given = random_inputs()

    def total(log_probs, entropy):
        return loss(dataclasses.replace(given, log_probs=log_probs, entropy=entropy), config).loss

    value, gradients = jax.jit(jax.value_and_grad(total, (0, 1)))(given.log_probs, given.entropy)
    at = np.asarray(given.log_probs, np.float64), np.asarray(given.entropy, np.float64)
    np.testing.assert_allclose(value, slow_loss(given, config, *at, at[0]), rtol=1e-5, atol=1e-6)
    for which, gradient in enumerate(gradients):
        for slot in np.ndindex(COMPLETION.shape):
            moved = [[a.copy() for a in at] for _ in range(2)]
            moved[0][which][slot] += 1e-5
            moved[1][which][slot] -= 1e-5
            up, down = (slow_loss(given, config, *arrays, at[0]) for arrays in moved)
            assert gradient[slot] == pytest.approx((up - down) / 2e-5, rel=1e-3, abs=2e-6), (which, slot)


@pytest.mark.parametrize("name", ["clip", "gspo", "cispo"])
@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_shares_of_micro_batches_add_up_to_the_loss_of_the_minibatch(name, aggregation):
    config = settings(loss=name, aggregation=aggregation, importance="sequence", entropy_bonus=0.1)
    given = random_inputs()
    arrays = [f.name for f in dataclasses.fields(given) if getattr(given, f.name).ndim]
    whole = loss(given, config)
    parts = [
        loss(dataclasses.replace(given, **{name: getattr(given, name)[a:b] for name in arrays}), config)
        for a, b in ((0, 1), (1, 4))
    ]
    np.testing.assert_allclose(sum(part.loss for part in parts), whole.loss, rtol=1e-5, atol=1e-6)
    for metric, value in whole.metrics.items():
        np.testing.assert_allclose(sum(part.metrics[metric] for part in parts), value, rtol=1e-5, atol=1e-6)
