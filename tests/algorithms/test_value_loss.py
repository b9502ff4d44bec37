"""The critic's loss against numbers worked out by hand and a slow loop, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmmr1_jax.algorithms.value_loss import value_loss

OPTIONS = dict(tokens_total=jnp.float32(1), clip=0.2)


def one(value, old, wanted, **options):
    given = [jnp.full((1, 1), x, jnp.float32) for x in (value, old, wanted, 1)]
    return value_loss(*given, **(OPTIONS | options))


@pytest.mark.parametrize(
    "value, old, wanted, loss, held",
    [
        (1.0, 0.5, 0.4, 0.18, 0),  # clipped to 0.7: 0.3^2 = 0.09 is less than 0.6^2 = 0.36
        (1.0, 0.5, 1.2, 0.125, 1),  # clipped to 0.7: 0.5^2 = 0.25 is more than 0.2^2 = 0.04
        (0.6, 0.5, 1.2, 0.18, 0),  # inside: 0.6^2
    ],
)
def test_loss_of_one_token_equals_the_one_worked_out_by_hand(value, old, wanted, loss, held):
    total, told = one(value, old, wanted)
    np.testing.assert_allclose(total, loss, rtol=1e-6)
    assert told["value/clip_fraction"] == held
    np.testing.assert_allclose(told["loss/value"], loss, rtol=1e-6)


def test_without_a_clip_it_is_half_the_square():
    np.testing.assert_allclose(one(1.0, 0.5, 1.2, clip=0.0)[0], 0.02, rtol=1e-5)


def slow(values, old, returns, mask, clip):
    """Loss and gradient, token by token."""
    tokens, loss, gradient = mask.sum(), 0.0, np.zeros(values.shape)
    for at in np.ndindex(values.shape):
        if not mask[at]:
            continue
        v, o, r = float(values[at]), float(old[at]), float(returns[at])
        near = min(max(v, o - clip), o + clip) if clip else v
        if (near - r) ** 2 > (v - r) ** 2:  # outside the clip: the value moves nothing
            loss += 0.5 * (near - r) ** 2 / tokens
        else:
            loss += 0.5 * (v - r) ** 2 / tokens
            gradient[at] = (v - r) / tokens
    return loss, gradient


@pytest.mark.parametrize("clip", [0.0, 0.2])
def test_loss_and_gradient_equal_the_loop_over_tokens_however_rows_are_cut(clip):
    rng = np.random.default_rng(0)
    values, old, returns = (rng.normal(size=(4, 9)).astype(np.float32) for _ in range(3))
    old = values + 0.3 * old
    mask = (rng.random((4, 9)) < 0.7).astype(np.float32)
    old, returns = old * mask, returns * mask  # 0 at padding, as packing leaves them
    values[mask == 0] = np.inf  # what padding holds is anyone's guess
    expected, gradient = slow(values, old, returns, mask, clip)

    def part(values, rows):
        return value_loss(values, old[rows], returns[rows], mask[rows], jnp.float32(mask.sum()), clip)[0]

    whole, slope = jax.value_and_grad(part)(jnp.asarray(values), slice(None))
    np.testing.assert_allclose(whole, expected, rtol=1e-5)
    np.testing.assert_allclose(slope, gradient, atol=1e-6)
    assert (gradient[mask > 0] == 0).any() == bool(clip)
    cut = [part(jnp.asarray(values[rows]), rows) for rows in (slice(0, 1), slice(1, 4))]
    np.testing.assert_allclose(sum(cut), expected, rtol=1e-5)
