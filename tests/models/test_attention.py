"""Attention against a softmax written out query by query in NumPy: values, log-sum-exp and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmmr1_jax.models.attention import xla
from lmmr1_jax.models.attention.backends import BACKENDS
from lmmr1_jax.models.attention.mask import KeyIntervals, causal_intervals, window_intervals

HEADS, KV_HEADS, WIDTH = 4, 2, 8


def oracle(q, k, v, low, high):
    """The two outputs of attention, float64, a query and a head at a time; -inf for a query that sees no key."""
    out, lse = np.zeros(q.shape), np.full((q.shape[0], q.shape[2], q.shape[1]), -np.inf)
    for b, i, h in np.ndindex(q.shape[:3]):
        seen = np.flatnonzero((low[b] <= i) & (i < high[b]))
        if len(seen):
            kv_head = h // (q.shape[2] // k.shape[2])
            scores = k[b, seen, kv_head].astype(np.float64) @ q[b, i, h].astype(np.float64) / np.sqrt(q.shape[3])
            lse[b, h, i] = np.logaddexp.reduce(scores)
            out[b, i, h] = np.exp(scores - lse[b, h, i]) @ v[b, seen, kv_head]
    return out, lse


@jax.jit
def dense(q, k, v, low, high):
    """The same in JAX, for its gradients; where a query sees no key its log-sum-exp is 0."""
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], 2) for x in (k, v))
    query = jnp.arange(q.shape[1])[:, None]
    seen = ((low[:, None] <= query) & (query < high[:, None]))[:, None]
    scores = jnp.where(seen, jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5, -1e9)
    sees = seen.any(-1)
    weights = jnp.where(sees[..., None], jax.nn.softmax(scores), 0)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v), jnp.where(sees, jax.nn.logsumexp(scores, -1), 0)


def packed_rows(rng, rows, total):
    """Intervals of random groups: a prompt and up to four completions each, then padding."""
    low, high = np.zeros((2, rows, total), np.int32)
    for row in range(rows):
        at = 0
        while True:
            lengths = rng.integers(1, total // 4, rng.integers(1, 6))
            if at + lengths.sum() > total:
                break
            ends = at + np.cumsum(lengths)
            low[row, at : ends[-1]] = np.arange(at, ends[-1])
            high[row, at : ends[-1]] = np.repeat([ends[-1], *ends[1:]], lengths)
            at = ends[-1]
    return low, high


def frames(rng, rows, total):
    """Intervals of random frames, some of whose slots are padding."""
    low, high = np.zeros((2, rows, total), np.int32)
    for row in range(rows):
        bounds = [0, *sorted(rng.choice(np.arange(1, total), 3, replace=False))]
        for start, end in zip(bounds[:-1], bounds[1:], strict=True):
            held = start + np.flatnonzero(rng.random(end - start) < 0.8)
            low[row, held], high[row, held] = start, end
    return low, high


def arrays(rng, batch, queries, keys):
    shapes = (batch, queries, HEADS, WIDTH), (batch, keys, KV_HEADS, WIDTH), (batch, keys, KV_HEADS, WIDTH)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("block", [128, 7])
@pytest.mark.parametrize("layout", [packed_rows, frames])
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients_equal_a_softmax_over_the_keys_seen(backend, layout, block, monkeypatch):
    monkeypatch.setattr(xla, "QUERY_BLOCK", block)
    rng, batch, total = np.random.default_rng(0), 6, 40
    low, high = layout(rng, batch, total)
    q, k, v = arrays(rng, batch, total, total)
    mask = KeyIntervals(low, high, causal=layout is packed_rows)
    expected_out, expected_lse = oracle(q, k, v, low, high)
    sees = np.isfinite(expected_lse)
    cotangents = rng.normal(size=q.shape).astype(np.float32), rng.normal(size=sees.shape) * sees
    cotangents = cotangents[0], cotangents[1].astype(np.float32)

    @jax.jit
    def ours(q, k, v):
        values, pull = jax.vjp(lambda q, k, v: BACKENDS[backend](q, k, v, mask), q, k, v)
        return values, pull(cotangents)

    (out, lse), gradients = ours(q, k, v)
    np.testing.assert_allclose(out, expected_out, atol=2e-5)
    np.testing.assert_allclose(np.asarray(lse)[sees], expected_lse[sees], atol=2e-5)
    assert lse.dtype == jnp.float32 and (np.asarray(lse)[~sees] < -1e29).all() and (~sees).any()
    _, pull = jax.vjp(lambda q, k, v: dense(q, k, v, low, high), q, k, v)
    for ours_, theirs in zip(gradients, pull(cotangents), strict=True):
        np.testing.assert_allclose(ours_, theirs, atol=5e-5)


def test_two_sets_of_keys_merge_by_their_log_sum_exp():
    rng = np.random.default_rng(1)
    q, k, v = arrays(rng, 2, 3, 10)
    # Key j is seen from query j - 7 on, as in a cache; the last query of the second row sees no key of the first set.
    low = np.tile(np.maximum(np.arange(10) - 7, 0), (2, 1)).astype(np.int32)
    high = np.full((2, 10), 3, np.int32)
    high[1, :5] = 2
    parts = [
        xla.attend(q, k[:, cut], v[:, cut], KeyIntervals(low[:, cut], high[:, cut], causal=False))
        for cut in (slice(0, 5), slice(5, 10))
    ]
    whole = np.logaddexp(*(np.asarray(lse) for _, lse in parts))
    merged = sum(np.asarray(out) * np.exp(np.asarray(lse) - whole).transpose(0, 2, 1)[..., None] for out, lse in parts)
    expected_out, expected_lse = oracle(q, k, v, low, high)
    np.testing.assert_allclose(whole, expected_lse, atol=1e-5)
    np.testing.assert_allclose(merged, expected_out, atol=1e-5)


def test_a_query_that_sees_nothing_gives_zero_and_a_finite_gradient():
    q, k, v = arrays(np.random.default_rng(2), 2, 4, 4)
    nothing = KeyIntervals(*np.zeros((2, 2, 4), np.int32))
    out, pull = jax.vjp(lambda q, k, v: xla.attend(q, k, v, nothing)[0], q, k, v)
    for array in (out, *pull(jnp.ones_like(q))):
        assert not np.any(array)


def test_causal_intervals_are_a_padded_rows_past():
    mask = causal_intervals(np.array([3, 5, 0]), 5)
    low, high = np.asarray(mask.low)[..., None, :], np.asarray(mask.high)[..., None, :]
    query = np.arange(5)[:, None]
    seen = (low <= query) & (query < high)
    past = np.tril(np.ones((5, 5), bool))
    assert mask.causal and (seen[1] == past).all() and not seen[2].any()
    assert (seen[0][:3] == past[:3] & (np.arange(5) < 3)).all()


def test_a_window_sees_its_own_keys_and_no_padding():
    whole = KeyIntervals(np.array([[0, 0, 0, 0, 4, 0, 6, 6]]), np.array([[4, 4, 0, 4, 6, 0, 8, 8]]), causal=False)
    mask = window_intervals(whole, 4)
    assert not mask.causal and not np.any(mask.low)
    assert np.asarray(mask.high).tolist() == [[4, 4, 0, 4], [4, 0, 4, 4]]


def test_a_causal_mask_of_other_keys_than_the_queries_is_refused():
    q, k, v = arrays(np.random.default_rng(3), 2, 3, 5)
    with pytest.raises(ValueError, match="as many keys as queries, not 5 and 3"):
        xla.attend(q, k, v, KeyIntervals(*np.ones((2, 2, 5), np.int32)))


def test_bfloat16_inputs_keep_a_float32_softmax():
    q, k, v = arrays(np.random.default_rng(4), 2, 16, 16)
    mask = causal_intervals(np.array([16, 16]), 16)
    exact, exact_lse = xla.attend(q, k, v, mask)
    rough, rough_lse = xla.attend(*(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)), mask)
    assert rough.dtype == jnp.bfloat16 and rough_lse.dtype == jnp.float32
    np.testing.assert_allclose(rough.astype(jnp.float32), exact, atol=0.05)
    np.testing.assert_allclose(rough_lse, exact_lse, atol=0.05)
