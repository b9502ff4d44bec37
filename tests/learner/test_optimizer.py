"""AdamW, its schedule and its clipping against numbers worked out by hand and against optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lmmr1_jax.learner import optimizer


def test_learning_rate_peaks_after_warm_up_and_ends_at_its_floor():
    rate = optimizer.warmup_cosine(2.0, 100, warmup_ratio=0.03, min_learning_rate_ratio=0.1)
    # 100 updates: ceil(3) of warm-up at 1/3, 2/3, 3/3 of the peak; 97 of cosine, the last at 10 %
    rates = [float(rate(i)) for i in range(100)]
    np.testing.assert_allclose(rates[:3], [2 / 3, 4 / 3, 2.0], rtol=1e-6)
    np.testing.assert_allclose(rates[99], 0.2, rtol=1e-6)
    half = 2 + 97 / 2  # number - warmup = 48.5 of 97, between two updates
    np.testing.assert_allclose((rates[int(half)] + rates[int(half) + 1]) / 2, 1.1, rtol=1e-5)
    assert all(a >= b for a, b in zip(rates[2:], rates[3:], strict=False))


def test_a_run_of_one_update_makes_it_at_the_peak():
    assert float(optimizer.warmup_cosine(0.5, 1, warmup_ratio=0.03, min_learning_rate_ratio=0.1)(0)) == 0.5


def tree(seed, scale=1.0):
    a, b, c = jax.random.split(jax.random.key(seed), 3)
    normal = jax.random.normal
    return {
        "down": {"kernel": scale * normal(a, (3, 4)), "bias": scale * normal(b, (4,))},
        "norm": {"scale": scale * normal(c, (4,))},
    }


def adamw(schedule, **options):
    settings = {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.0, "max_grad_norm": 1.0}
    return optimizer.adamw(schedule, **(settings | options))


def test_updates_equal_those_of_optax_at_the_rates_of_the_learners_own_count():
    ours = adamw(lambda step: 0.01 / (step + 1), weight_decay=0.1, max_grad_norm=0.5)
    theirs = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(
            lambda count: 0.01 / (count + 1), b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1,
            mask={"down": {"kernel": True, "bias": False}, "norm": {"scale": False}},
        ),
    )  # fmt: skip
    params = expected = tree(0)
    state, their_state = ours.init(params), theirs.init(params)
    for number in range(3):
        gradients = tree(number + 1, 0.3)
        updates, state = ours.update(gradients, state, params, step=jnp.int32(number))
        params = optax.apply_updates(params, updates)
        updates, their_state = theirs.update(gradients, their_state, expected)
        expected = optax.apply_updates(expected, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), params, expected)


def test_gradients_under_the_limit_keep_their_bits_and_those_above_it_their_direction():
    gradients = {"kernel": jnp.array([0.3, 0.4])}
    np.testing.assert_allclose(optimizer.global_norm(gradients), 0.5)
    under, _ = optimizer.clip_by_global_norm(1.0).update(gradients, optax.EmptyState())
    assert under["kernel"].tobytes() == gradients["kernel"].tobytes()
    above, _ = optimizer.clip_by_global_norm(0.05).update(gradients, optax.EmptyState())
    np.testing.assert_allclose(above["kernel"], [0.03, 0.04], rtol=1e-6)
