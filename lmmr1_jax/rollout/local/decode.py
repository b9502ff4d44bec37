"""One token per step for a whole batch of groups: the decoder unrolled over its layers, with caches.

The layers are the model's own; only attention is written for a single token and its caches. A group's prompt is
attended to by all its completions from one set of keys and values; each completion has keys and values of its own
beside it. The two parts of attention share one softmax.

P prompts, G completions of each, B = P * G rows; H query heads, K key heads, M = H / K, d = head_dim; T new tokens,
L prompt tokens, V ids.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lmmr1_jax.models.decoder import bind_layer, rope_angles
from lmmr1_jax.models.layers import rms_norm
from lmmr1_jax.rollout.local.draw import draw_tokens, most_probable_tokens
from weights_bridge.architecture import TextConfig


class DecoderWeights(NamedTuple):
    """The decoder's parameters in the compute dtype, laid out for single steps.

    Attributes:
      embedding, head: `[V, D]`; the same array where they are tied.
      norm: `[D]`.
      layers: the parameters of each layer, from `unstack_layers`.
    """

    embedding: Array
    head: Array
    norm: Array
    layers: tuple[dict[str, Any], ...]


class Request(NamedTuple):
    """What to sample, beside the prompts.

    Attributes:
      keys: typed random keys `[P, G]`, one per completion.
      wanted: bool `[P, G]`, False for rows that only fill the batch.
      temperature: positive float32; ignored when greedy.
      banned: int32 ids that are never sampled.
      ends: int32 ids that end a completion.
      limit: int32, new tokens at most.
      top_p, top_k: as in `draw_tokens`.
    """

    keys: Array
    wanted: Bool[Array, "P G"]
    temperature: Float[Array, ""]
    banned: Int[Array, "banned"]
    ends: Int[Array, "ends"]
    limit: Int[Array, ""]
    top_p: Float[Array, ""] | None = None
    top_k: Int[Array, ""] | None = None


def unstack_layers(layers: dict[str, Any], config: TextConfig, dtype: jnp.dtype) -> tuple[dict[str, Any], ...]:
    """The stacked layers of `language/layers` one by one, kernels and biases in `dtype`, norms as they are."""

    def cast(path, leaf):
        return leaf if path[-1].key == "scale" else leaf.astype(dtype)

    stacked = jax.tree_util.tree_map_with_path(cast, layers)
    return tuple(jax.tree.map(operator.itemgetter(index), stacked) for index in range(config.num_layers))


def decode(
    weights: DecoderWeights,
    hidden: Float[Array, "P D"],
    prompt_keys: Float[Array, "N P L K d"],
    prompt_values: Float[Array, "N P L K d"],
    prompt_lengths: Int[Array, "P"],
    next_positions: Int[Array, "P"],
    request: Request,
    *,
    config: TextConfig,
    new_tokens: int,
    greedy: bool,
) -> tuple[Int[Array, "P G T"], Float[Array, "P G T"], Int[Array, "P G"]]:
    """Samples until every wanted completion has ended or `request.limit` (at most `new_tokens`) is reached.

    Args:
      hidden: the final-normed hidden state of each prompt's last token.
      prompt_keys, prompt_values: after the rotary embedding, padded on the right.

    Returns:
      Ids and float32 policy log-probs (greedy: at temperature 1), and each completion's number of tokens, its end
      token included; what stands behind them is meaningless.
    """
    prompts, group = request.wanted.shape
    batch = prompts * group
    dtype = hidden.dtype
    uniforms = _uniforms(request.keys.reshape(batch), new_tokens)
    beyond_prompt = jnp.arange(prompt_keys.shape[2]) >= prompt_lengths[:, None]
    prompt_bias = jnp.where(beyond_prompt, -jnp.inf, 0.0)[:, None, None, None, :]
    caches = tuple(_empty_cache(prompts, group, new_tokens, config, dtype) for _ in weights.layers)
    prompt_caches = tuple(
        (jnp.swapaxes(prompt_keys[index], 1, 2), jnp.swapaxes(prompt_values[index], 1, 2))
        for index in range(config.num_layers)
    )

    def unfinished(state):
        step, _, _, _, lengths, _ = state
        return (step < request.limit) & jnp.any(request.wanted & (lengths == 0))

    def advance(state):
        step, hidden, tokens, log_probs, lengths, caches = state
        token, log_prob = _draw(weights.head, hidden, uniforms[step], request, greedy)
        tokens = jax.lax.dynamic_update_index_in_dim(tokens, token, step, 0)
        log_probs = jax.lax.dynamic_update_index_in_dim(log_probs, log_prob, step, 0)
        ended = jnp.any(token[:, None] == request.ends, 1).reshape(prompts, group)
        lengths = jnp.where((lengths == 0) & ended, step + 1, lengths)
        x = weights.embedding[token].astype(dtype)
        # A completion's three positions are equal.
        rope = rope_angles(jnp.broadcast_to(jnp.repeat(next_positions, group) + step, (3, batch)), config)
        new_caches = []
        for layer, cache, prompt_cache in zip(weights.layers, caches, prompt_caches, strict=True):
            bound = bind_layer(layer, config, dtype)
            q, k, v = bound.project(x, rope)
            attended, cache = _attend(q, k, v, step, cache, prompt_cache, prompt_bias, group)
            x = bound.finish(x, attended)
            new_caches.append(cache)
        return step + 1, rms_norm(x, weights.norm, config.rms_norm_eps), tokens, log_probs, lengths, tuple(new_caches)

    state = (
        jnp.int32(0),
        jnp.repeat(hidden, group, 0),
        jnp.zeros((new_tokens, batch), jnp.int32),
        jnp.zeros((new_tokens, batch), jnp.float32),
        jnp.zeros((prompts, group), jnp.int32),
        caches,
    )
    step, _, tokens, log_probs, lengths, _ = jax.lax.while_loop(unfinished, advance, state)
    lengths = jnp.where(lengths == 0, step, lengths)
    by_group = lambda x: x.T.reshape(prompts, group, new_tokens)  # noqa: E731
    return by_group(tokens), by_group(log_probs), lengths


def _uniforms(keys, new_tokens: int) -> Float[Array, "T 2 B"]:
    """Two numbers per token and row; token t's depend on the row's key and t alone."""
    return jax.vmap(lambda key: jax.random.uniform(key, (new_tokens, 2)), out_axes=-1)(keys)


def _draw(head, hidden, uniforms, request: Request, greedy: bool):
    scaled = hidden if greedy else (hidden.astype(jnp.float32) / request.temperature).astype(hidden.dtype)
    logits = jax.lax.dot_general(head, scaled, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    if request.banned.size:
        logits = logits.at[request.banned].set(-jnp.inf)
    if greedy:
        return most_probable_tokens(logits)
    return draw_tokens(logits, uniforms, top_p=request.top_p, top_k=request.top_k)


def _empty_cache(prompts: int, group: int, new_tokens: int, config: TextConfig, dtype):
    """Keys `[P, K, G, d, T]` and values `[P, K, G, T, d]`: the layouts in which no product transposes them."""
    rows = (prompts, config.num_kv_heads, group)
    shapes = (*rows, config.head_dim, new_tokens), (*rows, new_tokens, config.head_dim)
    return tuple(jnp.zeros(shape, dtype) for shape in shapes)


def _attend(q, k, v, step, cache, prompt_cache, prompt_bias, group: int):
    """Attention of one token of every row: `[B, H, d]`, and the cache with the token's key and value."""
    (batch, heads, d), kv_heads, dtype = q.shape, k.shape[1], q.dtype
    prompts, per_kv = batch // group, heads // kv_heads
    query = (q * d**-0.5).astype(dtype).reshape(prompts, group, kv_heads, per_kv, d)
    query = jnp.swapaxes(query, 1, 2)  # [P, K, G, M, d]
    by_head = lambda y: jnp.swapaxes(y.reshape(prompts, group, kv_heads, d), 1, 2)  # noqa: E731
    keys, values = cache
    new_key, new_value = by_head(k), by_head(v)
    keys = jax.lax.dynamic_update_slice_in_dim(keys, new_key[..., None], step, 4)
    values = jax.lax.dynamic_update_slice_in_dim(values, new_value[..., None, :], step, 3)
    prompt_keys, prompt_values = prompt_cache

    product = lambda spec, a, b: jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)  # noqa: E731
    flat_query = query.reshape(prompts, kv_heads, group * per_kv, d)
    prompt_scores = product("pkqd,pkld->pkql", flat_query, prompt_keys)
    prompt_scores = prompt_scores.reshape(prompts, kv_heads, group, per_kv, -1) + prompt_bias
    own_scores = product("pkgmd,pkgdt->pkgmt", query, keys)
    own_scores = jnp.where(jnp.arange(keys.shape[-1]) <= step, own_scores, -jnp.inf)
    highest = jnp.maximum(jnp.max(prompt_scores, -1, keepdims=True), jnp.max(own_scores, -1, keepdims=True))
    prompt_weights, own_weights = jnp.exp(prompt_scores - highest), jnp.exp(own_scores - highest)
    total = jnp.sum(prompt_weights, -1, keepdims=True) + jnp.sum(own_weights, -1, keepdims=True)
    flat_weights = prompt_weights.astype(dtype).reshape(prompts, kv_heads, group * per_kv, -1)
    attended = product("pkql,pkld->pkqd", flat_weights, prompt_values).reshape(query.shape)
    attended = (attended + product("pkgmt,pkgtd->pkgmd", own_weights.astype(dtype), values)) / total
    return jnp.swapaxes(attended, 1, 2).reshape(batch, heads, d).astype(dtype), (keys, values)
