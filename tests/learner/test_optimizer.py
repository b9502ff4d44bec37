"""AdamW, its schedule and its clipping against numbers worked out by hand and against optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lmmr1_jax.config.schema import LearnerConfig
from lmmr1_jax.learner import optimizer


def test_learning_rate_peaks_after_warm_up_and_ends_at_its_floor():
    config = LearnerConfig(learning_rate=2.0, warmup_ratio=0.03, min_learning_rate_ratio=0.1)
    # 100 updates: ceil(3) of warm-up at 1/3, 2/3, 3/3 of the peak; 97 of cosine, the last at 10 %
    rates = [float(optimizer.learning_rate(i, config, 100)) for i in range(100)]
    np.testing.assert_allclose(rates[:3], [2 / 3, 4 / 3, 2.0], rtol=1e-6)
    np.testing.assert_allclose(rates[99], 0.2, rtol=1e-6)
    half = 2 + 97 / 2  # number - warmup = 48.5 of 97, between two updates
    np.testing.assert_allclose((rates[int(half)] + rates[int(half) + 1]) / 2, 1.1, rtol=1e-5)
    assert all(a >= b for a, b in zip(rates[2:], rates[3:], strict=False))


def test_a_run_of_one_update_makes_it_at_the_peak():
    assert float(optimizer.learning_rate(0, LearnerConfig(learning_rate=0.5), 1)) == 0.5


def tree(seed, scale=1.0):
    a, b, c = jax.random.split(jax.random.key(seed), 3)
    normal = jax.random.normal
    return {
        "down": {"kernel": scale * normal(a, (3, 4)), "bias": scale * normal(b, (4,))},
        "norm": {"scale": scale * normal(c, (4,))},
    }


def test_updates_equal_those_of_optax():
    config = LearnerConfig(weight_decay=0.1, max_grad_norm=0.5)
    params, gradients = tree(0), tree(1)
    theirs = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(
            0.01, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1,
            mask={"down": {"kernel": True, "bias": False}, "norm": {"scale": False}},
        ),
    )  # fmt: skip
    ours, moments = params, optimizer.adam(config).init(params)
    state = theirs.init(params)
    for number in range(3):
        gradients = tree(number + 1, 0.3)
        norm = optimizer.global_norm(gradients)
        ours, moments = optimizer.apply(ours, gradients, moments, config, jnp.float32(0.01), norm)
        updates, state = theirs.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), ours, params)


def test_gradients_under_the_limit_are_not_scaled():
    gradients = {"kernel": jnp.array([0.3, 0.4])}
    np.testing.assert_allclose(optimizer.global_norm(gradients), 0.5)
    config = LearnerConfig(max_grad_norm=1.0)
    moments = optimizer.adam(config).init(gradients)
    _, moments = optimizer.apply(gradients, gradients, moments, config, jnp.float32(0), jnp.float32(0.5))
    np.testing.assert_allclose(moments.mu["kernel"], 0.1 * gradients["kernel"], rtol=1e-6)


def test_a_frozen_tower_is_no_part_of_what_is_trained():
    params = {"language": {"a": 1}, "vision": {"b": 2}}
    assert optimizer.split_frozen(params, True) == ({"language": {"a": 1}}, {"vision": {"b": 2}})
    assert optimizer.split_frozen(params, False) == (params, {})
