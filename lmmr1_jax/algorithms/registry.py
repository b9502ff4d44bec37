"""The algorithms by name, and what a run must compute for the one that its config chooses."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmmr1_jax.algorithms import (
    cispo,
    dapo,
    dr_grpo,
    grpo,
    gspo,
    policy_losses,
    ppo,
    reinforce_pp,
    reinforce_pp_baseline,
    rloo,
    rloo_lmm_r1,
)
from lmmr1_jax.algorithms.algorithm import READ_BY_ADVANTAGES, READ_BY_LOSSES, Algorithm, PolicyLoss
from lmmr1_jax.config.schema import AlgorithmConfig, CriticConfig, TrainConfig
from lmmr1_jax.runtime.errors import UserError
from lmmr1_jax.runtime.python_file import load_module

_log = logging.getLogger(__name__)

_MODULES = (ppo, rloo, rloo_lmm_r1, reinforce_pp, reinforce_pp_baseline, grpo, dr_grpo, dapo, gspo, cispo)
ALGORITHMS: dict[str, Algorithm] = {module.ALGORITHM.name: module.ALGORITHM for module in _MODULES}
POLICY_LOSSES: dict[str, PolicyLoss] = {
    "clip": policy_losses.clip,
    "gspo": gspo.gspo,
    "cispo": cispo.cispo,
    "policy_gradient": policy_losses.policy_gradient,
}
"""What `algorithm.loss` names."""

# Fields that mean something only beside others: field, the other, the values of it that read the field, in words.
_Read = tuple[str, str, Callable[[Any], bool], str]
_READ_WITH: tuple[_Read, ...] = (
    ("clip_low", "loss", lambda loss: loss in ("clip", "gspo", "cispo"), "another loss than policy_gradient"),
    ("clip_high", "loss", lambda loss: loss in ("clip", "gspo", "cispo"), "another loss than policy_gradient"),
    ("dual_clip", "loss", lambda loss: loss in ("clip", "gspo"), "loss clip or gspo"),
    ("aggregation_length", "aggregation", lambda kind: kind == "constant", "aggregation constant"),
    ("normalize_std", "normalize_advantages", lambda scope: scope != "none", "normalize_advantages group or batch"),
    ("overlong_penalty", "overlong_share", lambda share: share > 0, "an overlong_share above 0"),
    ("kl_estimator", "kl_coefficient", lambda coefficient: coefficient > 0, "a kl_coefficient above 0"),
    ("kl_placement", "kl_coefficient", lambda coefficient: coefficient > 0, "a kl_coefficient above 0"),
    ("kl_target", "kl_coefficient", lambda coefficient: coefficient > 0, "a kl_coefficient above 0"),
    ("kl_horizon", "kl_target", lambda target: target > 0, "a kl_target above 0"),
    ("importance_cap", "importance", lambda kind: kind != "none", "another importance than none"),
)


def algorithm(config: AlgorithmConfig) -> Algorithm:
    """The algorithm that a config chooses.

    Raises:
      UserError: there is none of that name, or `algorithm.file` exports none or another.
    """
    if config.file:
        own = _from_file(str(Path(config.file).resolve()))
        if config.name not in (AlgorithmConfig.name, own.name):
            raise UserError(
                f"algorithm.name is {config.name!r}, but algorithm.file {config.file} has {own.name!r}; leave one of "
                "them out"
            )
        return own
    if config.name not in ALGORITHMS:
        raise UserError(
            f"algorithm.name is {config.name!r}; known are {', '.join(sorted(ALGORITHMS))}, and algorithm.file names a "
            "file with another"
        )
    return ALGORITHMS[config.name]


def policy_loss(config: AlgorithmConfig) -> PolicyLoss:
    """The policy's surrogate: the one that `algorithm.loss` names, else the algorithm's own."""
    loss = config.loss or algorithm(config).loss
    return POLICY_LOSSES[loss] if isinstance(loss, str) else loss


def resolved(config: TrainConfig) -> TrainConfig:
    """The config with the algorithm's own values where fields are None; the same again if they are filled in.

    `algorithm.loss` stays None where the algorithm has a function of its own, which no name stands for.
    """
    given, chosen = config.algorithm, algorithm(config.algorithm)
    own = {name: value for name, value in _own(chosen).items() if getattr(given, name) is None}
    file = str(Path(given.file).resolve()) if given.file else ""
    filled = dataclasses.replace(given, name=chosen.name, file=file, **own)
    if filled.aggregation == "constant" and filled.aggregation_length is None:
        filled = dataclasses.replace(filled, aggregation_length=config.rollout.max_new_tokens)
    return dataclasses.replace(config, algorithm=filled)


def checked(config: TrainConfig) -> TrainConfig:
    """The resolved config; refuses, with a UserError, what the algorithm cannot do or would silently not read."""
    given, filled, chosen = config.algorithm, resolved(config).algorithm, algorithm(config.algorithm)
    own = _own(chosen)

    def is_set(field: str) -> bool:  # a value that the algorithm has anyway was written out, as in a run's config.json
        return _is_set(given, field) and not (field in own and getattr(given, field) == own[field])

    for field in READ_BY_ADVANTAGES:
        if is_set(field) and field not in chosen.reads:
            readers = [name for name, known in ALGORITHMS.items() if field in known.reads]
            raise UserError(
                f"algorithm.{field} is set, but {chosen.name} does not read it (only {', '.join(readers)} "
                f"{'do' if len(readers) > 1 else 'does'})"
            )
    for field, other, is_read, wanted in _READ_WITH:
        reads_itself = field in READ_BY_LOSSES and filled.loss is None and field in chosen.reads
        if is_set(field) and not reads_itself and not is_read(getattr(filled, other)):
            raise UserError(
                f"algorithm.{field} is set, but nothing reads it while algorithm.{other} is "
                f"{getattr(filled, other)!r}: it needs {wanted}"
            )
    _check_critic(config.critic, chosen)
    if chosen.critic and filled.normalize_advantages == "group":
        raise UserError(
            f"algorithm.normalize_advantages is 'group', but {chosen.name} has a critic for a baseline and compares no "
            "completions of one prompt; it must be batch or none"
        )
    if config.rollout.completions < chosen.smallest_group:
        raise UserError(
            f"rollout.completions is {config.rollout.completions}; {chosen.name} compares completions of one prompt "
            f"and needs at least {chosen.smallest_group}"
        )
    if "group" in (filled.normalize_rewards, filled.normalize_advantages) and config.rollout.completions < 2:
        raise UserError(
            "rollout.completions is 1; normalising over the group compares completions of one prompt and needs at "
            "least 2"
        )
    if filled.dynamic_sampling_rounds and config.rollout.completions < 2:
        raise UserError(
            "rollout.completions is 1; algorithm.dynamic_sampling_rounds looks for groups whose completions earn "
            "differently and needs at least 2"
        )
    if filled.dynamic_sampling_rounds and config.rollout.staleness:
        raise UserError(
            "algorithm.dynamic_sampling_rounds samples more within a step, so that nothing can be sampled ahead of it; "
            "rollout.staleness must be 0"
        )
    if needs_reference(config) and filled.kl_placement == "loss" and filled.kl_estimator == "k1":
        _log.warning("the gradient of k1 as a loss has mean zero: k2 or k3 pull the policy to the reference")
    return dataclasses.replace(config, algorithm=filled)


def updates_per_rollout(config: TrainConfig) -> int:
    """Optimizer updates that one rollout batch is used for."""
    return config.learner.epochs * config.learner.minibatches


def needs_reference(config: TrainConfig) -> bool:
    """Whether the starting policy has to be kept in memory and run."""
    return config.algorithm.kl_coefficient > 0


def needs_critic(config: TrainConfig) -> bool:
    """Whether values are learned beside the policy."""
    return algorithm(config.algorithm).critic


def needs_old(config: TrainConfig) -> bool:
    """Whether policy log-probs have to be computed by a pass of their own before the first update.

    With one update per rollout the ratio divides by the same forward pass, gradient stopped. The KL in the reward
    needs the log-probs before there are advantages.
    """
    in_reward = needs_reference(config) and resolved(config).algorithm.kl_placement == "reward"
    return in_reward or updates_per_rollout(config) > 1


def _own(chosen: Algorithm) -> dict[str, Any]:
    """What the fields are where the config has None."""
    names = {loss: name for name, loss in POLICY_LOSSES.items()}
    return chosen.filled_in | {"loss": chosen.loss if isinstance(chosen.loss, str) else names.get(chosen.loss)}


@functools.cache  # one file is one algorithm, whose loss is compiled once
def _from_file(path: str) -> Algorithm:
    try:
        found = getattr(load_module(path), "ALGORITHM", None)
    except ValueError as error:
        raise UserError(f"algorithm.file {path}: {error}") from None
    if not isinstance(found, Algorithm):
        what = "no ALGORITHM" if found is None else f"an ALGORITHM of type {type(found).__name__}"
        raise UserError(f"algorithm.file {path} exports {what}; it must export `ALGORITHM = Algorithm(...)`")
    if found.name in ALGORITHMS:
        raise UserError(f"algorithm.file {path}: {found.name!r} is the name of an algorithm that ships; choose another")
    if isinstance(found.loss, str) and found.loss not in POLICY_LOSSES:
        raise UserError(f"algorithm.file {path}: loss is {found.loss!r}; it must be one of {', '.join(POLICY_LOSSES)}")
    return found


def _check_critic(config: CriticConfig, chosen: Algorithm) -> None:
    with_critic = [name for name, known in ALGORITHMS.items() if known.critic]
    for field in dataclasses.fields(CriticConfig):
        if not chosen.critic and _is_set(config, field.name):
            raise UserError(
                f"critic.{field.name} is set, but {chosen.name} has no critic (only {', '.join(with_critic)} has one)"
            )
    for field, backbone in (("path", "own"), ("freeze_vision", "own"), ("loss_weight", "shared")):
        if config.backbone != backbone and _is_set(config, field):
            raise UserError(
                f"critic.{field} is set, but nothing reads it while critic.backbone is {config.backbone!r}: it needs "
                f"{backbone}"
            )


def _is_set(config: AlgorithmConfig | CriticConfig, field: str) -> bool:
    return getattr(config, field) != getattr(type(config), field)
