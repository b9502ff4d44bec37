"""Log-probs of chosen tokens without ever holding `[rows, tokens, vocabulary]`.

Tokens are taken in chunks, all rows in each, so that a batch axis that is split over devices stays split. The
backward pass computes a chunk's logits again from the saved log-sum-exp: one more product instead of memory. With
p = softmax(l), H = -sum(p log p) and the cotangents g of log p[target] and e of H,

    d l_v = g (1[v = target] - p_v) - e p_v (log p_v + H).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

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
    size = max(1, min(tokens, chunk // rows))
    count = -(-tokens // size)
    pad = count * size - tokens

    def chunked(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, count, size, *x.shape[2:]), 1, 0)

    scaled = hidden if temperature == 1 else (hidden / temperature).astype(hidden.dtype)
    offset = None if banned is None else jnp.where(banned, jnp.float32(_BANNED), jnp.float32(0))
    parts = _log_probs(chunked(scaled), embedding, chunked(targets), offset)
    log_probs, entropy = (jnp.moveaxis(part, 0, 1).reshape(rows, -1)[:, :tokens] for part in parts)
    return log_probs, entropy


def sampling_logits(
    hidden: Float[Array, "*batch embed"],
    embedding: Float[Array, "vocabulary embed"],
    banned: Bool[Array, " vocabulary"] | None,
    temperature: float,
) -> Float[Array, "*batch vocabulary"]:
    """float32 logits / temperature with banned ids at -inf: softmax of them is the policy."""
    logits = _logits(hidden, embedding.astype(hidden.dtype)) / temperature
    return logits if banned is None else jnp.where(banned, -jnp.inf, logits)


def _logits(hidden: Array, embedding: Array) -> Array:
    return jnp.einsum("...d,vd->...v", hidden, embedding, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _log_probs(hidden: Array, embedding: Array, targets: Array, offset: Array | None):
    return _forward(hidden, embedding, targets, offset)[0]


def _forward(hidden: Array, embedding: Array, targets: Array, offset: Array | None):
    table = embedding.astype(hidden.dtype)

    def body(_, part):
        states, chosen = part
        logits = _logits(states, table) if offset is None else _logits(states, table) + offset
        largest = logits.max(-1, keepdims=True)
        weights = jnp.exp(logits - largest)
        total = weights.sum(-1)
        normalizer = jnp.log(total) + largest[..., 0]
        entropy = normalizer - (weights * logits).sum(-1) / total
        picked = jnp.take_along_axis(logits, chosen[..., None], -1)[..., 0]
        return None, (picked - normalizer, entropy, normalizer)

    _, (log_probs, entropy, normalizer) = jax.lax.scan(body, None, (hidden, targets))
    return (log_probs, entropy), (hidden, embedding, targets, offset, normalizer, entropy)


def _backward(residuals, cotangents):
    hidden, embedding, targets, offset, normalizer, entropy = residuals
    table = embedding.astype(hidden.dtype)

    def body(d_table, part):
        states, chosen, normalizer, entropy, d_log_prob, d_entropy = part
        logits = _logits(states, table) if offset is None else _logits(states, table) + offset
        log_p = logits - normalizer[..., None]
        scale = d_log_prob[..., None] + d_entropy[..., None] * (log_p + entropy[..., None])
        hit = jnp.arange(table.shape[0], dtype=chosen.dtype) == chosen[..., None]
        d_logits = jnp.where(hit, d_log_prob[..., None], 0) - jnp.exp(log_p) * scale
        d_logits = d_logits.astype(table.dtype)
        d_states = jnp.einsum("rcv,vd->rcd", d_logits, table, preferred_element_type=jnp.float32)
        d_table += jnp.einsum("rcv,rcd->vd", d_logits, states, preferred_element_type=jnp.float32)
        return d_table, d_states.astype(states.dtype)

    zeros = jnp.zeros(embedding.shape, jnp.float32)
    d_table, d_hidden = jax.lax.scan(body, zeros, (hidden, targets, normalizer, entropy, *cotangents))
    return d_hidden, d_table.astype(embedding.dtype), None, None


_log_probs.defvjp(_forward, _backward)
