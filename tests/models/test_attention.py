"""The one attention function against a dense softmax with the mask written out, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmmr1_jax.models.attention import xla as attention
from lmmr1_jax.models.attention.xla import attend


@jax.jit
def dense(q, k, v, seen):
    repeated = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, repeated, 2), jnp.repeat(v, repeated, 2)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    scores = jnp.where(seen[:, None], scores, -1e9)
    weights = jnp.where(seen[:, None].any(-1, keepdims=True), jax.nn.softmax(scores), 0)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def value_and_pullback(function, cotangent, *arguments):
    """The function's value and its vector-Jacobian products, in one program."""

    @jax.jit
    def run(*arguments):
        value, pull = jax.vjp(function, *arguments)
        return value, *pull(cotangent)

    return run(*arguments)


def packed_row(lengths, total):
    """Segments and prefixes of a row of groups, each a list of lengths, its prompt first; then padding."""
    segments, prefixes, segment = [], [], 0
    for group in lengths:
        prefix = segment + 1
        for length in group:
            segment += 1
            segments += [segment] * length
            prefixes += [prefix] * length
    pad = [0] * (total - len(segments))
    return segments + pad, prefixes + pad


def arrays(queries, keys, seed=0, heads=4, kv_heads=2, width=8, batch=2):
    rng = jax.random.split(jax.random.key(seed), 4)
    shapes = [(batch, queries, heads, width), (batch, keys, kv_heads, width), (batch, keys, kv_heads, width)]
    return [jax.random.normal(r, s) for r, s in zip(rng, shapes, strict=False)]


@pytest.mark.parametrize("block", [128, 7])
def test_packed_rows_see_their_own_segment_and_their_prompt_only(block, monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    total = 40
    rows = [packed_row([[5, 4, 6], [7, 3]], total), packed_row([[1, 1], [20, 9, 2, 4]], total)]
    segments, prefixes = (np.array(x) for x in zip(*rows, strict=True))
    q, k, v = arrays(total, total)
    index = np.arange(total)
    same = segments[:, :, None] == segments[:, None]
    prompt = prefixes[:, :, None] == segments[:, None]
    seen = (segments[:, None] > 0) & (same | prompt) & (index[None] <= index[:, None])
    cotangent = jax.random.normal(jax.random.key(5), q.shape)

    def ours(q, k, v):
        return attend(q, k, v, query_segments=segments, query_prefixes=prefixes, key_segments=segments)

    got = value_and_pullback(ours, cotangent, q, k, v)
    expected = value_and_pullback(lambda q, k, v: dense(q, k, v, seen), cotangent, q, k, v)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    assert not np.any(np.asarray(got[0])[segments == 0])


def test_explicit_indices_order_queries_against_a_cache():
    q, k, v = arrays(3, 10)
    query_index, key_index = np.array([[7, 8, 9], [2, 3, 4]]), np.tile(np.arange(10), (2, 1))
    ones = np.ones((2, 10), np.int32)
    order = dict(query_index=query_index, key_index=key_index)
    out = jax.jit(functools.partial(attend, query_segments=ones[:, :3], key_segments=ones, **order))(q, k, v)
    expected = dense(q, k, v, key_index[:, None] <= query_index[:, :, None])
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_without_causality_whole_segments_see_each_other():
    q, k, v = arrays(12, 12, kv_heads=4)
    segments = np.array([[1] * 5 + [2] * 4 + [0] * 3, [1] * 12])
    sees_all = functools.partial(attend, query_segments=segments, key_segments=segments, causal=False)
    out = jax.jit(sees_all)(q, k, v)
    seen = (segments[:, :, None] == segments[:, None]) & (segments[:, None] > 0)
    np.testing.assert_allclose(out, dense(q, k, v, seen), atol=1e-5)


def test_a_query_that_sees_nothing_gives_zero_and_a_finite_gradient():
    q, k, v = arrays(4, 4)
    segments = np.zeros((2, 4), np.int32)

    def blind(q, k, v):
        return attend(q, k, v, query_segments=segments, key_segments=segments)

    for array in value_and_pullback(blind, jnp.ones_like(q), q, k, v):
        assert not np.any(array)


def test_lengths_that_differ_need_indices():
    q, k, v = arrays(3, 5)
    with pytest.raises(ValueError, match="query_index"):
        attend(q, k, v, query_segments=np.ones((2, 3)), key_segments=np.ones((2, 5)))


def test_bfloat16_inputs_keep_a_float32_softmax():
    q, k, v = arrays(16, 16)
    ones = np.ones((2, 16), np.int32)
    sees_all = jax.jit(functools.partial(attend, query_segments=ones, key_segments=ones))
    exact = sees_all(q, k, v)
    rough = sees_all(*(x.astype(jnp.bfloat16) for x in (q, k, v)))
    assert rough.dtype == jnp.bfloat16
    np.testing.assert_allclose(rough.astype(jnp.float32), exact, atol=0.05)
