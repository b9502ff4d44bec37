"""The learner from its config: which objectives, which optimizers, and what of a model is frozen."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lmmr1_jax.algorithms.registry import needs_critic, needs_reference, resolved, updates_per_rollout
from lmmr1_jax.config.schema import LearnerConfig, TrainConfig
from lmmr1_jax.learner.learner import Learner
from lmmr1_jax.learner.objectives.policy import PolicyGradient
from lmmr1_jax.learner.objectives.value import CRITIC, Critic, PolicyGradientAndValue, Value
from lmmr1_jax.learner.optimizer import adamw, warmup_cosine
from lmmr1_jax.learner.state import POLICY
from lmmr1_jax.learner.trainable import Trainable, trainable_mask
from lmmr1_jax.models.network import Network, Params
from lmmr1_jax.models.packed_forward import SamplingDistribution
from lmmr1_jax.parallel.sharding import ShardingRules, parameter_shardings
from weights_bridge.architecture import num_heads_by_axis


def assemble_learner(
    config: TrainConfig,
    network: Network,
    axes: dict[str, Any],
    mesh: Mesh,
    total_updates: int,
    *,
    banned_ids: Sequence[int] = (),
    rules: ShardingRules | None = None,
    critic: Critic | None = None,
) -> Learner:
    """The learner of a policy, and of its critic where the algorithm has one.

    Args:
      config: reads `algorithm`, `critic`, `learner`, `model.freeze_vision` and `rollout.temperature`.
      network: the policy's.
      axes: nested dict of logical axes, `weights_bridge.tensor_table.logical_axes`.
      mesh: see `sharding.make_mesh`.
      total_updates: optimizer updates of the whole run, for the learning rate.
      banned_ids: token ids that the sampler never draws.
      rules: how logical axes are split.
      critic: needed exactly where the algorithm has one.
    """
    if (critic is not None) != needs_critic(config):
        raise ValueError(f"{config.algorithm.name} has {'a' if needs_critic(config) else 'no'} critic")
    config = resolved(config)
    banned = None
    if len(banned_ids):
        banned = np.zeros(network.config.text.vocab_size, bool)
        banned[list(banned_ids)] = True
    policy = PolicyGradient(
        network,
        SamplingDistribution(banned, config.rollout.temperature, config.learner.logprob_chunk),
        config.algorithm,
        mesh,
        on_policy=updates_per_rollout(config) == 1,
        with_reference=needs_reference(config),
    )
    # A policy that waits for its critic begins its schedule when it begins to move.
    waits = config.critic.freezing_actor_steps * updates_per_rollout(config)
    frozen = config.model.freeze_vision
    params = _with_shardings(network.abstract_params, axes, mesh, rules, network)
    trainables = {POLICY: _trainable(params, config.learner, total_updates - waits, frozen, waits=waits)}
    passes = {"log_probs": policy.log_probs}
    if critic is None:
        return Learner(trainables, [policy], mesh, passes=passes)
    of_critic = dataclasses.replace(
        config.learner,
        learning_rate=config.critic.learning_rate,
        warmup_ratio=config.critic.warmup_ratio,
        max_grad_norm=config.critic.max_grad_norm,
    )
    params = _with_shardings(critic.abstract_params, critic.axes, mesh, rules, critic.backbone or network)
    frozen = frozen or config.critic.freeze_vision
    trainables[CRITIC] = _trainable(params, of_critic, total_updates, frozen, prefix="value/")
    clip = config.critic.value_clip
    if critic.backbone is None:
        both = PolicyGradientAndValue(policy, clip, config.critic.loss_weight)
        return Learner(trainables, [both], mesh, passes=passes | {"values": both.values})
    value = Value(critic.backbone, clip, mesh)
    return Learner(trainables, [policy, value], mesh, passes=passes | {"values": value.values})


def _trainable(
    params: Params, config: LearnerConfig, updates: int, freeze_vision: bool, *, waits: int = 0, prefix: str = ""
) -> Trainable:
    frozen = ("vision/*",) if freeze_vision and "vision" in params else ()
    schedule = warmup_cosine(
        config.learning_rate,
        updates,
        warmup_ratio=config.warmup_ratio,
        min_learning_rate_ratio=config.min_learning_rate_ratio,
    )
    optimizer = adamw(
        schedule,
        b1=config.adam_b1,
        b2=config.adam_b2,
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
    )
    return Trainable(params, optimizer, trainable_mask(params, frozen=frozen), schedule, waits, prefix)


def _with_shardings(
    params: Params, axes: dict[str, Any], mesh: Mesh, rules: ShardingRules | None, network: Network
) -> Params:
    shardings = parameter_shardings(params, axes, mesh, rules, num_heads_by_axis(network.config))
    return jax.tree.map(lambda p, at: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=at), params, shardings)
