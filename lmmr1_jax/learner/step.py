"""The learner: one jitted update with one donated state.

The minibatch lies on the devices as n micro-batches of one static shape. A loop inside the program runs over as many
of them as hold anything and adds up gradients in float32; the loss of each is divided by counts over the whole
minibatch from the start, so that the sum is the gradient, however the minibatch was cut.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from lmmr1_jax.algorithms import losses
from lmmr1_jax.algorithms.loss_inputs import LossInputs
from lmmr1_jax.algorithms.registry import needs_reference, resolved, updates_per_rollout
from lmmr1_jax.config import TrainConfig
from lmmr1_jax.learner import optimizer
from lmmr1_jax.learner.forward import Policy, micro_batch, response_log_probs
from lmmr1_jax.learner.sharding import ShardingRules, head_units, parameter_shardings, put_batch
from lmmr1_jax.learner.state import TrainState
from lmmr1_jax.types import PackedBatch

Metrics = dict[str, Float[Array, ""]]
_SUMMED = (*losses.METRICS, "gap/mean")


class Learner:
    """Owns the compiled programs; the state travels through them.

    Metrics of an update, all over the minibatch's completion tokens: `loss/policy`, `kl` (by the config's estimator;
    0 without a reference), `clip_fraction`, `importance/mean` and `importance/clipped` (weights of the correction for
    the sampler), `entropy` (nats per token), `gap/mean` and `gap/max` (learner against sampler log-probs, before the
    update), `grad_norm` (before clipping), `learning_rate`, and `skipped_updates` (since the run's start).

    Attributes:
      shardings: of the parameters, a nested dict of NamedSharding.
      state_shardings: of the whole TrainState.
      on_policy: one update per rollout, so that the ratio divides by the same forward pass.
    """

    def __init__(
        self,
        network: Any,
        config: TrainConfig,
        mesh: Mesh,
        layout_axes: Any,
        total_updates: int,
        *,
        banned_ids: Sequence[int] = (),
        rules: ShardingRules | None = None,
    ):
        """
        Args:
          network: a `models.network.Network`.
          config: reads `algorithm`, `learner`, `model.freeze_vision` and `rollout.temperature`.
          mesh: see `sharding.make_mesh`.
          layout_axes: nested dict of logical axes, `weights_bridge.layout.logical_axes`.
          total_updates: optimizer updates of the whole run, for the learning rate.
          banned_ids: token ids that the sampler never draws.
          rules: how logical axes are split.
        """
        self.network = network
        self.config = config = resolved(config)
        self.mesh = mesh
        self.total_updates = total_updates
        self.on_policy = updates_per_rollout(config) == 1
        banned = None
        if len(banned_ids):
            banned = np.zeros(network.config.text.vocab_size, bool)
            banned[list(banned_ids)] = True
        self.policy = Policy(banned, config.rollout.temperature, config.learner.logprob_chunk)

        params = network.abstract_params
        self.shardings = parameter_shardings(params, layout_axes, mesh, rules, head_units(network.config))
        self._replicated = NamedSharding(mesh, PartitionSpec())
        abstract = jax.eval_shape(self._initial_state, params)
        self.state_shardings = self._shard_state(abstract)
        self._abstract = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            abstract,
            self.state_shardings,
        )
        self._init = jax.jit(self._initial_state, donate_argnums=0, out_shardings=self.state_shardings)
        self._update = jax.jit(
            functools.partial(_update, self),
            donate_argnums=0,
            out_shardings=(self.state_shardings, self._replicated),
        )
        self._gradients = jax.jit(functools.partial(_gradients, self))
        self._log_probs = jax.jit(functools.partial(_log_probs, self), out_shardings=self._replicated)

    def init_state(self, params: dict[str, Any]) -> TrainState:
        """The state before the first update. `params` are donated: use `state.params` from here on."""
        return self._init(jax.device_put(params, self.shardings))

    def abstract_state(self) -> TrainState:
        """The state's shapes, dtypes and shardings, for `Checkpoints.restore_newest`."""
        return self._abstract

    def put(self, batch: PackedBatch) -> PackedBatch:
        """The batch on the devices, rows split over data and fsdp."""
        return put_batch(batch, self.mesh)

    def update(self, state: TrainState, batch: PackedBatch) -> tuple[TrainState, dict[str, float]]:
        """One optimizer update; `state` is donated and gone afterwards. An update whose gradients are not finite
        changes nothing but `step` and `skipped_updates`. `batch` may be on the host or from `put`."""
        state, metrics = self._update(state, self.put(batch))
        return state, {name: value.item() for name, value in jax.device_get(metrics).items()}

    def log_probs(self, params: dict[str, Any], batch: PackedBatch) -> np.ndarray:
        """Policy log-probs under `params`, float32 `[n, R, M]`, 0 at padding: the pass for old and reference."""
        return np.asarray(self._log_probs(params, self.put(batch)))

    def gradients(self, params: dict[str, Any], batch: PackedBatch) -> tuple[dict[str, Any], dict[str, float]]:
        """Gradients of the trainable parameters before clipping, and the metrics; what `update` applies."""
        gradients, metrics = self._gradients(params, self.put(batch))
        return gradients, {name: float(value) for name, value in jax.device_get(metrics).items()}

    def _initial_state(self, params: dict[str, Any]) -> TrainState:
        trained, _ = optimizer.split_frozen(params, self.config.model.freeze_vision)
        zero = jnp.zeros((), jnp.int32)
        return TrainState(params, optimizer.adam(self.config.learner).init(trained), zero, zero)

    def _shard_state(self, abstract: TrainState) -> TrainState:
        trained, _ = optimizer.split_frozen(self.shardings, self.config.model.freeze_vision)
        moments = abstract.opt_state._replace(count=self._replicated, mu=trained, nu=trained)
        return TrainState(self.shardings, moments, self._replicated, self._replicated)


def _update(learner: Learner, state: TrainState, batch: PackedBatch) -> tuple[TrainState, Metrics]:
    config = learner.config.learner
    gradients, metrics = _gradients(learner, state.params, batch)
    norm = optimizer.global_norm(gradients)
    rate = optimizer.learning_rate(state.step, config, learner.total_updates)
    trained, frozen = optimizer.split_frozen(state.params, learner.config.model.freeze_vision)
    moved, moments = optimizer.apply(trained, gradients, state.opt_state, config, rate, norm)
    # A norm is finite exactly when all gradients are (short of overflow, which is no gradient to follow either).
    finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss/policy"])
    moved, moments = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), (moved, moments), (trained, state.opt_state)
    )
    skipped = state.skipped_updates + jnp.where(finite, 0, 1)
    state = TrainState(moved | frozen, moments, state.step + 1, skipped)
    return state, metrics | {"grad_norm": norm, "learning_rate": rate, "skipped_updates": skipped}


def _gradients(learner: Learner, params: dict[str, Any], batch: PackedBatch) -> tuple[dict[str, Any], Metrics]:
    """Gradients of the minibatch's loss for the trainable parameters, and the metrics that come with it."""
    trained, frozen = optimizer.split_frozen(params, learner.config.model.freeze_vision)
    differentiate = jax.grad(lambda trained, micro: _loss(learner, trained | frozen, micro), has_aux=True)

    def add(index, total):
        gradients, sums, largest = total
        more, (more_sums, gap) = differentiate(trained, micro_batch(batch, index))
        return (
            jax.tree.map(jnp.add, gradients, more),
            jax.tree.map(jnp.add, sums, more_sums),
            jnp.maximum(largest, gap),
        )

    zero = jnp.zeros((), jnp.float32)
    sums = dict.fromkeys(_SUMMED, zero)
    start = (jax.tree.map(jnp.zeros_like, trained), sums, zero)
    if batch.tokens.shape[0] == 1:
        # One micro-batch needs no accumulator beside its own gradients.
        gradients, sums, largest = add(0, start)
    else:
        gradients, sums, largest = jax.lax.fori_loop(0, batch.micro_batches, add, start)
    return gradients, sums | {"gap/max": largest}


def _loss(learner: Learner, params: dict[str, Any], micro: PackedBatch):
    """This micro-batch's share of the loss; its shares of the metrics and its largest gap beside it."""
    config = learner.config
    log_probs, entropy = response_log_probs(learner.network, params, micro, learner.policy, learner.mesh)
    # On the policy that sampled, ratio 1 is exact: the very same numbers, gradient stopped.
    old = jax.lax.stop_gradient(log_probs) if learner.on_policy else micro.old_log_probs
    out = losses.loss(
        LossInputs(
            log_probs=log_probs,
            entropy=entropy,
            old_log_probs=old,
            sampler_log_probs=micro.sampler_log_probs,
            reference_log_probs=micro.reference_log_probs if needs_reference(config) else None,
            advantages=micro.advantages,
            mask=micro.mask,
            completion=micro.completion,
            tokens_total=micro.tokens_total,
            completions_total=micro.completions_total,
            kl_coefficient=micro.kl_coefficient,
        ),
        config.algorithm,
    )
    held = micro.mask > 0
    gap = jnp.where(held, jnp.abs(jax.lax.stop_gradient(log_probs) - micro.sampler_log_probs), 0.0)
    return out.loss, (out.metrics | {"gap/mean": jnp.sum(gap) / micro.tokens_total}, jnp.max(gap))


def _log_probs(learner: Learner, params: dict[str, Any], batch: PackedBatch) -> Float[Array, "n rows slots"]:
    def fill(index, result):
        micro = micro_batch(batch, index)
        log_probs, _ = response_log_probs(learner.network, params, micro, learner.policy, learner.mesh)
        return result.at[index].set(jnp.where(micro.mask > 0, log_probs, 0.0))

    return jax.lax.fori_loop(0, batch.micro_batches, fill, jnp.zeros(batch.mask.shape, jnp.float32))
