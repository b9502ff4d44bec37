"""A micro-batch through the model: from tokens and patches to the hidden states that predict the completion tokens,
and from these to policy log-probs."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from lmmr1_jax.models.attention.mask import KeyIntervals
from lmmr1_jax.models.log_probs import token_log_probs
from lmmr1_jax.models.network import Network, Params, Transformer
from lmmr1_jax.parallel.sharding import constrain_rows
from lmmr1_jax.types.batches import PackedBatch, VisionBatch

_TOTALS = ("micro_batches", "tokens_total", "completions_total", "kl_coefficient")


@dataclasses.dataclass(frozen=True)
class SamplingDistribution:
    """What makes logits the distribution that was sampled from, and how they are computed.

    Attributes:
      banned: bool `[V]`, ids that are never sampled; None bans nothing.
      temperature: of sampling.
      chunk: completion tokens whose logits exist at a time.
    """

    banned: Bool[Array, "vocab"] | None
    temperature: float
    chunk: int


def micro_batch(batch: PackedBatch, index: Int[Array, ""]) -> PackedBatch:
    """Inside jit: micro-batch `index`, its arrays without their leading axis; totals stay the minibatch's."""
    totals = {name: getattr(batch, name) for name in _TOTALS}
    arrays = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch) if f.name not in _TOTALS}
    chosen = jax.tree.map(lambda array: jax.lax.dynamic_index_in_dim(array, index, keepdims=False), arrays)
    return PackedBatch(**chosen, **totals)


def hidden_states(model: Transformer, micro: PackedBatch, mesh: Mesh) -> Float[Array, "rows length width"]:
    """Final hidden states of a micro-batch's rows, images in their places."""
    features = None if micro.vision is None else _image_features(model, micro.vision, mesh)
    embedded = constrain_rows(model.embed(micro.tokens, micro.image_slots, features), mesh)
    return constrain_rows(model.hidden(embedded, micro.positions, KeyIntervals(micro.low, micro.high)), mesh)


def response_hidden(model: Transformer, micro: PackedBatch, mesh: Mesh) -> Float[Array, "rows slots width"]:
    """The hidden state in which each completion token is chosen; padding slots hold numbers without meaning.

    Each response slot takes its hidden state from the row, so that what follows, a head's product or a value's, runs
    over completion tokens alone.
    """
    hidden = hidden_states(model, micro, mesh)
    return constrain_rows(jax.vmap(lambda row, source: row[source])(hidden, micro.source), mesh)


def log_probs_of(
    model: Transformer,
    hidden: Float[Array, "rows slots embed"],
    micro: PackedBatch,
    policy: SamplingDistribution,
    mesh: Mesh,
) -> tuple[Float[Array, "rows slots"], Float[Array, "rows slots"]]:
    """Policy log-probs of the tokens that were chosen in these states, and the entropy of what they were drawn from."""
    head = model.head_embedding()
    if mesh.size > 1:
        # Gathered over fsdp once, before the loop over chunks: W[V_tensor, D_fsdp] -> W[V_tensor, D].
        whole = PartitionSpec("tensor" if head.shape[0] % mesh.shape["tensor"] == 0 else None)
        head = jax.lax.with_sharding_constraint(head, NamedSharding(mesh, whole))
    return token_log_probs(
        hidden, head, micro.target, banned=policy.banned, temperature=policy.temperature, chunk=policy.chunk
    )


def response_log_probs(
    network: Network, params: Params, micro: PackedBatch, policy: SamplingDistribution, mesh: Mesh
) -> tuple[Float[Array, "rows slots"], Float[Array, "rows slots"]]:
    """Policy log-probs of a micro-batch's completion tokens, and the entropy of what they were drawn from.

    Args:
      network: the policy's.
      params: its parameters, as they are (no copy is made).
      micro: one micro-batch, see `micro_batch`.
      policy: the distribution.
      mesh: where rows are split.
    """
    model = network.bind(params)
    return log_probs_of(model, response_hidden(model, micro, mesh), micro, policy, mesh)


def _image_features(model: Transformer, vision: VisionBatch, mesh: Mesh) -> Float[Array, "rows merged width"]:
    # A micro-batch of text in a run with images has vision rows too, empty ones: the tower is not run for them.
    def encode(vision: VisionBatch):
        return constrain_rows(model.encode_images(vision), mesh)

    shape = jax.eval_shape(encode, vision)
    return jax.lax.cond(jnp.any(vision.high > 0), encode, lambda _: jnp.zeros(shape.shape, shape.dtype), vision)
