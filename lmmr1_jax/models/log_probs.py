"""Log-probs of chosen tokens without ever holding `[rows, tokens, vocabulary]`.

Tokens are taken in chunks, all rows in each, so that a batch axis that is split over devices stays split. On a CPU
the vocabulary is taken in blocks as well, small enough for logits to stay in the cache: writing them to memory and
reading them back costs as much as the products do. On accelerators a block is the whole vocabulary.

The backward pass computes logits again from the saved log-sum-exp: one more product instead of memory. With
p = softmax(l), H = -sum(p log p) and the cotangents g of log p[target] and e of H,

    d l_v = g (1[v = target] - p_v) - e p_v (log p_v + H).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

CPU_TOKENS, CPU_VOCABULARY = 1024, 256
"""A CPU's block: 1 MiB of logits."""
_BANNED = -1e30
"""Logit of a banned token: its probability is 0 exactly, and 0 * _BANNED is a number where 0 * -inf is none."""


def token_log_probs(
    hidden: Float[Array, "rows tokens embed"],
    embedding: Float[Array, "vocabulary embed"],
    targets: Int[Array, "rows tokens"],
    *,
    banned: Bool[Array, " vocabulary"] | None,
    temperature: float,
    chunk: int,
) -> tuple[Float[Array, "rows tokens"], Float[Array, "rows tokens"]]:
    """log softmax(hidden @ embedding.T / temperature) at the targets, banned ids left out, and the entropy in nats.

    Args:
      hidden: final hidden states of the positions that predict, in the compute dtype.
      embedding: the head's rows, float32; cast to hidden's dtype once, its gradient accumulates in float32.
      targets: the tokens that were chosen there.
      banned: ids that the policy never samples; None for the model's own distribution.
      temperature: of the policy.
      chunk: tokens, over all rows, whose logits exist at a time.

    Returns:
      log-probs and entropies, float32; both differentiable in hidden and embedding.
    """
    rows, tokens, _ = hidden.shape
    on_cpu = jax.default_backend() == "cpu"
    block = CPU_VOCABULARY if on_cpu else embedding.shape[0]
    size = max(1, min(tokens, (min(chunk, CPU_TOKENS) if on_cpu else chunk) // rows))
    count = -(-tokens // size)
    pad = count * size - tokens

    def chunked(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, count, size, *x.shape[2:]), 1, 0)

    scaled = hidden if temperature == 1 else (hidden / temperature).astype(hidden.dtype)
    offset = jnp.zeros(embedding.shape[0]) if banned is None else jnp.where(banned, jnp.float32(_BANNED), 0)
    parts = _log_probs(block, chunked(scaled), embedding, chunked(targets), offset)
    log_probs, entropy = (jnp.moveaxis(part, 0, 1).reshape(rows, -1)[:, :tokens] for part in parts)
    return log_probs, entropy


def _logits(hidden: Array, embedding: Array) -> Array:
    return jnp.einsum("...d,vd->...v", hidden, embedding, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_probs(block: int, hidden: Array, embedding: Array, targets: Array, offset: Array):
    return _forward(block, hidden, embedding, targets, offset)[0]


def _forward(block: int, hidden: Array, embedding: Array, targets: Array, offset: Array):
    table = embedding.astype(hidden.dtype)

    def over_vocabulary(start, rows, offsets, stats):
        def over_tokens(_, part):
            states, largest, total, weighted = part
            logits = _logits(states, rows) + offsets
            grown = jnp.maximum(largest, logits.max(-1))
            weights, shrink = jnp.exp(logits - grown[..., None]), jnp.exp(largest - grown)
            total = total * shrink + weights.sum(-1)
            return None, (grown, total, weighted * shrink + (weights * logits).sum(-1))

        return jax.lax.scan(over_tokens, None, (hidden, *stats))[1]

    none = jnp.zeros(targets.shape, jnp.float32)
    largest, total, weighted = _over_blocks(over_vocabulary, (none + _BANNED, none, none), table, offset, block)
    normalizer = largest + jnp.log(total)
    entropy = normalizer - weighted / total
    picked = jnp.einsum("...d,...d->...", hidden, table[targets], preferred_element_type=jnp.float32) + offset[targets]
    return (picked - normalizer, entropy), (hidden, embedding, targets, offset, normalizer, entropy)


def _backward(block: int, residuals, cotangents):
    hidden, embedding, targets, offset, normalizer, entropy = residuals
    table = embedding.astype(hidden.dtype)

    def over_vocabulary(start, rows, offsets, carry):
        d_hidden, d_table = carry
        ids = start + jnp.arange(rows.shape[0], dtype=targets.dtype)

        def over_tokens(d_rows, part):
            d_states, states, chosen, normalizer, entropy, d_log_prob, d_entropy = part
            log_p = _logits(states, rows) + offsets - normalizer[..., None]
            scale = d_log_prob[..., None] + d_entropy[..., None] * (log_p + entropy[..., None])
            d_logits = jnp.where(ids == chosen[..., None], d_log_prob[..., None], 0) - jnp.exp(log_p) * scale
            d_logits = d_logits.astype(rows.dtype)
            d_states += jnp.einsum("rcv,vd->rcd", d_logits, rows, preferred_element_type=jnp.float32)
            d_rows += jnp.einsum("rcv,rcd->vd", d_logits, states, preferred_element_type=jnp.float32)
            return d_rows, d_states

        zeros = jnp.zeros(rows.shape, jnp.float32)
        parts = (d_hidden, hidden, targets, normalizer, entropy, *cotangents)
        d_rows, d_hidden = jax.lax.scan(over_tokens, zeros, parts)
        return d_hidden, jax.lax.dynamic_update_slice_in_dim(d_table, d_rows, start, 0)

    zeros = jnp.zeros(hidden.shape, jnp.float32), jnp.zeros(embedding.shape, jnp.float32)
    d_hidden, d_table = _over_blocks(over_vocabulary, zeros, table, offset, block)
    return d_hidden.astype(hidden.dtype), d_table.astype(embedding.dtype), None, None


_log_probs.defvjp(_forward, _backward)


def _over_blocks(body, carry, table: Array, offset: Array, block: int):
    """carry = body(start, table rows, their offsets, carry) for every block of the vocabulary, the rest last."""
    whole, vocabulary = table.shape[0] // block, table.shape[0]

    def step(i, carry):
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=i * block, slice_size=block)
        return body(i * block, cut(table), cut(offset), carry)

    if whole == 1:
        carry = body(0, table[:block], offset[:block], carry)
    elif whole > 1:
        carry = jax.lax.fori_loop(0, whole, step, carry)
    if whole * block < vocabulary:
        carry = body(whole * block, table[whole * block :], offset[whole * block :], carry)
    return carry
