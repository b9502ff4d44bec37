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

from lmmr1_jax.algorithms import losses, value_loss
from lmmr1_jax.algorithms.loss_inputs import LossInputs
from lmmr1_jax.algorithms.registry import needs_critic, needs_reference, resolved, updates_per_rollout
from lmmr1_jax.config.schema import LearnerConfig, TrainConfig
from lmmr1_jax.learner import optimizer
from lmmr1_jax.learner.critic import Critic, optimizer_config, values_of, with_gradient_scaled
from lmmr1_jax.learner.state import CriticState, TrainState
from lmmr1_jax.models.packed_forward import (
    SamplingDistribution,
    log_probs_of,
    micro_batch,
    response_hidden,
    response_log_probs,
)
from lmmr1_jax.parallel.sharding import ShardingRules, head_units, parameter_shardings, put_batch
from lmmr1_jax.types.batches import PackedBatch

Metrics = dict[str, Float[Array, ""]]
_SUMMED = (*losses.METRICS, "gap/mean")


class Learner:
    """Owns the compiled programs; the state travels through them.

    Metrics of an update, all over the minibatch's completion tokens: `loss/policy`, `kl` (by the config's estimator;
    0 without a reference), `clip_fraction`, `importance/mean` and `importance/clipped` (weights of the correction for
    the sampler), `entropy` (nats per token), `gap/mean` and `gap/max` (learner against sampler log-probs, before the
    update), `grad_norm` (before clipping), `learning_rate`, and `skipped_updates` (since the run's start). With a
    critic also `loss/value`, `value/clip_fraction`, `value/grad_norm` and `value/learning_rate`.

    Attributes:
      critic: the critic without its parameters; None where the algorithm has none.
      shardings: of the policy's parameters, a nested dict of NamedSharding.
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
        critic: Critic | None = None,
    ):
        """
        Args:
          network: a `models.network.Network`.
          config: reads `algorithm`, `critic`, `learner`, `model.freeze_vision` and `rollout.temperature`.
          mesh: see `sharding.make_mesh`.
          layout_axes: nested dict of logical axes, `weights_bridge.tensor_table.logical_axes`.
          total_updates: optimizer updates of the whole run, for the learning rate.
          banned_ids: token ids that the sampler never draws.
          rules: how logical axes are split.
          critic: needed exactly where the algorithm has one.
        """
        if (critic is not None) != needs_critic(config):
            raise ValueError(f"{config.algorithm.name} has {'a' if needs_critic(config) else 'no'} critic")
        self.network = network
        self.config = config = resolved(config)
        self.mesh = mesh
        self.critic = critic
        self.total_updates = total_updates
        self.frozen_updates = config.critic.freezing_actor_steps * updates_per_rollout(config)
        self.freeze_vision = config.model.freeze_vision
        self.freeze_critic_vision = self.freeze_vision or config.critic.freeze_vision
        self.on_policy = updates_per_rollout(config) == 1
        banned = None
        if len(banned_ids):
            banned = np.zeros(network.config.text.vocab_size, bool)
            banned[list(banned_ids)] = True
        self.policy = SamplingDistribution(banned, config.rollout.temperature, config.learner.logprob_chunk)

        params = network.abstract_params
        self.shardings = parameter_shardings(params, layout_axes, mesh, rules, head_units(network.config))
        self._critic_shardings, critic_params = None, None
        if critic is not None:
            units = head_units((critic.backbone or network).config)
            critic_params = critic.abstract_params
            self._critic_shardings = parameter_shardings(critic_params, critic.axes, mesh, rules, units)
        self._replicated = NamedSharding(mesh, PartitionSpec())
        abstract = jax.eval_shape(self._initial_state, params, critic_params)
        self.state_shardings = self._shard_state(abstract)
        self._abstract = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            abstract,
            self.state_shardings,
        )
        self._init = jax.jit(self._initial_state, donate_argnums=(0, 1), out_shardings=self.state_shardings)
        self._update = jax.jit(
            functools.partial(_update, self),
            donate_argnums=0,
            out_shardings=(self.state_shardings, self._replicated),
        )
        self._gradients = jax.jit(lambda params, batch: _gradients(self, params, None, batch))
        self._log_probs = jax.jit(functools.partial(_log_probs, self), out_shardings=self._replicated)
        self._values = jax.jit(functools.partial(_values, self), out_shardings=self._replicated)

    def init_state(self, params: dict[str, Any], critic_params: dict[str, Any] | None = None) -> TrainState:
        """The state before the first update. Parameters are donated: use `state.params` from here on.

        Args:
          params: the policy's.
          critic_params: the critic's, where there is one.
        """
        critic_params = jax.device_put(critic_params, self._critic_shardings)
        return self._init(jax.device_put(params, self.shardings), critic_params)

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

    def values(self, state: TrainState, batch: PackedBatch) -> np.ndarray:
        """The critic's values of the states before the completion tokens, float32 `[n, R, M]`, 0 at padding."""
        return np.asarray(self._values(state.params, state.critic.params, self.put(batch)))

    def gradients(self, params: dict[str, Any], batch: PackedBatch) -> tuple[dict[str, Any], dict[str, float]]:
        """Gradients of the trainable parameters before clipping, and the metrics; what `update` applies. For learners
        without a critic."""
        (gradients, _), metrics = self._gradients(params, self.put(batch))
        return gradients, {name: float(value) for name, value in jax.device_get(metrics).items()}

    def _initial_state(self, params: dict[str, Any], critic_params: dict[str, Any] | None) -> TrainState:
        adam = optimizer.adam(self.config.learner)
        trained, _ = optimizer.split_frozen(params, self.freeze_vision)
        zero = jnp.zeros((), jnp.int32)
        critic = None
        if critic_params is not None:
            critic_trained, _ = optimizer.split_frozen(critic_params, self.freeze_critic_vision)
            critic = CriticState(critic_params, adam.init(critic_trained))
        return TrainState(params, adam.init(trained), zero, zero, critic)

    def _shard_state(self, abstract: TrainState) -> TrainState:
        def moments(opt_state, shardings, freeze):
            trained, _ = optimizer.split_frozen(shardings, freeze)
            return opt_state._replace(count=self._replicated, mu=trained, nu=trained)

        critic = None
        if abstract.critic is not None:
            shardings = self._critic_shardings
            opt_state = moments(abstract.critic.opt_state, shardings, self.freeze_critic_vision)
            critic = CriticState(shardings, opt_state)
        policy = moments(abstract.opt_state, self.shardings, self.freeze_vision)
        return TrainState(self.shardings, policy, self._replicated, self._replicated, critic)


def _update(learner: Learner, state: TrainState, batch: PackedBatch) -> tuple[TrainState, Metrics]:
    config, critic = learner.config.learner, state.critic
    (gradients, critic_gradients), metrics = _gradients(learner, state.params, critic and critic.params, batch)
    norm = optimizer.global_norm(gradients)
    # A norm is finite exactly when all gradients are (short of overflow, which is no gradient to follow either).
    finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss/policy"])
    if critic is not None:
        critic_norm = optimizer.global_norm(critic_gradients)
        finite = finite & jnp.isfinite(critic_norm) & jnp.isfinite(metrics["loss/value"])
    frozen = learner.frozen_updates
    # A policy that waits for its critic begins its schedule when it begins to move.
    rate = optimizer.learning_rate(state.step - frozen, config, learner.total_updates - frozen)
    if frozen:
        rate = jnp.where(state.step >= frozen, rate, 0.0)
    follow = finite & (state.step >= frozen) if frozen else finite
    params, moments = _moved(state.params, state.opt_state, gradients, config, rate, norm, follow)
    skipped = state.skipped_updates + jnp.where(finite, 0, 1)
    metrics = metrics | {"grad_norm": norm, "learning_rate": rate, "skipped_updates": skipped}
    if critic is not None:
        config = optimizer_config(learner.config)
        rate = optimizer.learning_rate(state.step, config, learner.total_updates)
        moved = _moved(critic.params, critic.opt_state, critic_gradients, config, rate, critic_norm, finite)
        critic = CriticState(*moved)
        metrics = metrics | {"value/grad_norm": critic_norm, "value/learning_rate": rate}
    return TrainState(params, moments, state.step + 1, skipped, critic), metrics


def _moved(params, opt_state, gradients, config: LearnerConfig, rate, norm, follow):
    """Parameters and moments after the update where `follow` is true, else as they were, like what has no gradient."""
    trained = {name: params[name] for name in gradients}
    moved, moments = optimizer.apply(trained, gradients, opt_state, config, rate, norm)
    moved, moments = jax.tree.map(lambda new, old: jnp.where(follow, new, old), (moved, moments), (trained, opt_state))
    return params | moved, moments


def _gradients(learner: Learner, params: dict[str, Any], critic: dict[str, Any] | None, batch: PackedBatch):
    """Gradients of the minibatch's loss for the trainable parameters of the policy and of the critic (None without),
    and the metrics that come with them.

    A critic with a backbone of its own has a loop of its own, so that only one model's activations exist at a time.
    """
    own = critic is not None and learner.critic.backbone is not None
    trained, frozen = optimizer.split_frozen(params, learner.freeze_vision)

    def policy_loss(trained, micro):
        return _loss(learner, trained[0] | frozen, trained[1], micro)

    head = None if own else critic
    names = _SUMMED if head is None else (*_SUMMED, *value_loss.METRICS)
    (gradients, critic_gradients), sums, gap = _accumulate(policy_loss, (trained, head), batch, names)
    if own:
        critic_trained, critic_frozen = optimizer.split_frozen(critic, learner.freeze_critic_vision)

        def critic_loss(trained, micro):
            values = learner.critic.values(learner.network, params, trained | critic_frozen, micro, learner.mesh)
            loss, told = _value_loss(learner, values, micro)
            return loss, (told, 0.0)

        critic_gradients, told, _ = _accumulate(critic_loss, critic_trained, batch, value_loss.METRICS)
        sums = sums | told
    return (gradients, critic_gradients), sums | {"gap/max": gap}


def _accumulate(loss, trained, batch: PackedBatch, names: Sequence[str]):
    """Gradients, summed metrics of these names, and the largest gap over the micro-batches that hold anything.

    `loss(trained, micro)` gives a micro-batch's share of the loss, and its shares of the metrics and its gap beside it.
    """
    differentiate = jax.grad(loss, has_aux=True)

    def add(index, total):
        gradients, sums, largest = total
        more, (more_sums, gap) = differentiate(trained, micro_batch(batch, index))
        return (
            jax.tree.map(jnp.add, gradients, more),
            jax.tree.map(jnp.add, sums, more_sums),
            jnp.maximum(largest, gap),
        )

    zero = jnp.zeros((), jnp.float32)
    start = (jax.tree.map(jnp.zeros_like, trained), dict.fromkeys(names, zero), zero)
    if batch.tokens.shape[0] == 1:
        # One micro-batch needs no accumulator beside its own gradients.
        return add(0, start)
    return jax.lax.fori_loop(0, batch.micro_batches, add, start)


def _loss(learner: Learner, params: dict[str, Any], head: dict[str, Any] | None, micro: PackedBatch):
    """This micro-batch's share of the loss; its shares of the metrics and its largest gap beside it.

    `head` is that of a critic that shares the backbone: then its loss is part of this one.
    """
    config = learner.config
    model = learner.network.bind(params)
    hidden = response_hidden(model, micro, learner.mesh)
    log_probs, entropy = log_probs_of(model, hidden, micro, learner.policy, learner.mesh)
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
    loss, told = out.loss, out.metrics | {"gap/mean": jnp.sum(gap) / micro.tokens_total}
    if head is not None:
        # The weight is the backbone's alone: the head has an optimizer of its own.
        values = values_of(with_gradient_scaled(hidden, config.critic.loss_weight), head)
        value, value_told = _value_loss(learner, values, micro)
        loss, told = loss + value, told | value_told
    return loss, (told, jnp.max(gap))


def _value_loss(learner: Learner, values: Float[Array, "rows slots"], micro: PackedBatch):
    clip = learner.config.critic.value_clip
    return value_loss.value_loss(values, micro.values, micro.returns, micro.mask, micro.tokens_total, clip)


def _log_probs(learner: Learner, params: dict[str, Any], batch: PackedBatch) -> Float[Array, "n rows slots"]:
    def of_micro(micro):
        return response_log_probs(learner.network, params, micro, learner.policy, learner.mesh)[0]

    return _per_token(of_micro, batch)


def _values(
    learner: Learner, params: dict[str, Any], critic: dict[str, Any], batch: PackedBatch
) -> Float[Array, "n rows slots"]:
    return _per_token(lambda micro: learner.critic.values(learner.network, params, critic, micro, learner.mesh), batch)


def _per_token(of_micro, batch: PackedBatch) -> Float[Array, "n rows slots"]:
    """What `of_micro` gives for the response slots of every micro-batch, 0 at padding."""

    def fill(index, result):
        micro = micro_batch(batch, index)
        return result.at[index].set(jnp.where(micro.mask > 0, of_micro(micro), 0.0))

    return jax.lax.fori_loop(0, batch.micro_batches, fill, jnp.zeros(batch.mask.shape, jnp.float32))
