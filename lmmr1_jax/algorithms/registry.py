"""The algorithms by name, what each of them reads, and what a run must compute for them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence

import numpy as np

from lmmr1_jax.algorithms import losses, rloo, rloo_lmm_r1
from lmmr1_jax.config import AlgorithmConfig, TrainConfig
from lmmr1_jax.errors import UserError
from lmmr1_jax.types import Rollout

_log = logging.getLogger(__name__)

Advantages = Callable[[Sequence[Rollout], AlgorithmConfig, Sequence[np.ndarray] | None], list[Rollout]]
Loss = Callable[[losses.LossInputs, AlgorithmConfig], losses.LossOutputs]


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """An algorithm: how rewards become advantages, and the loss that they weigh.

    Attributes:
      name: what `algorithm.name` says.
      advantages: pure NumPy function over groups.
      loss: pure function of one micro-batch.
      reads: the fields of `AlgorithmConfig` that it reads, beside `name`.
      smallest_group: completions per prompt that its baseline needs.
    """

    name: str
    advantages: Advantages
    loss: Loss
    reads: frozenset[str]
    smallest_group: int


_SHARED = {"clip", "kl_coefficient", "kl_estimator", "kl_placement", "importance", "importance_cap"}
_ALGORITHMS = (
    Algorithm("rloo", rloo.advantages, losses.clipped_policy_loss, frozenset(_SHARED), 2),
    Algorithm(
        "rloo_lmm_r1",
        rloo_lmm_r1.advantages,
        losses.clipped_policy_loss,
        frozenset(_SHARED | {"reward_clip", "normalize_std"}),
        2,
    ),
)
ALGORITHMS: dict[str, Algorithm] = {a.name: a for a in _ALGORITHMS}


def algorithm(name: str) -> Algorithm:
    """The algorithm of that name; UserError that lists the names when there is none."""
    if name not in ALGORITHMS:
        raise UserError(f"algorithm.name is {name!r}; known are {', '.join(sorted(ALGORITHMS))}")
    return ALGORITHMS[name]


def check(config: TrainConfig) -> None:
    """Refuse, with a UserError, what the chosen algorithm cannot do or would silently not read."""
    chosen = algorithm(config.algorithm.name)
    for field in dataclasses.fields(AlgorithmConfig):
        if field.name == "name" or field.name in chosen.reads:
            continue
        if getattr(config.algorithm, field.name) != field.default:
            readers = [a.name for a in _ALGORITHMS if field.name in a.reads]
            raise UserError(
                f"algorithm.{field.name} is set, but {chosen.name} does not read it (only {', '.join(readers)} does)"
            )
    if config.rollout.completions < chosen.smallest_group:
        raise UserError(
            f"rollout.completions is {config.rollout.completions}; {chosen.name} compares completions of one prompt "
            f"and needs at least {chosen.smallest_group}"
        )
    if config.algorithm.kl_coefficient < 0:
        raise UserError(f"algorithm.kl_coefficient is {config.algorithm.kl_coefficient}; it must not be negative")
    if not 0 < config.algorithm.clip:
        raise UserError(f"algorithm.clip is {config.algorithm.clip}; it must be positive")
    if config.algorithm.importance_cap < 1:
        raise UserError(f"algorithm.importance_cap is {config.algorithm.importance_cap}; it must be at least 1")
    if needs_reference(config) and config.algorithm.kl_placement == "loss" and config.algorithm.kl_estimator == "k1":
        _log.warning("the gradient of k1 as a loss has mean zero: k2 or k3 pull the policy to the reference")


def updates_per_rollout(config: TrainConfig) -> int:
    """Optimizer updates that one rollout batch is used for."""
    return config.learner.epochs * config.learner.minibatches


def needs_reference(config: TrainConfig) -> bool:
    """Whether the starting policy has to be kept in memory and run."""
    return config.algorithm.kl_coefficient > 0


def needs_old(config: TrainConfig) -> bool:
    """Whether policy log-probs have to be computed by a pass of their own before the first update.

    With one update per rollout the ratio divides by the same forward pass, gradient stopped. The KL in the reward
    needs the log-probs before there are advantages.
    """
    return updates_per_rollout(config) > 1 or (needs_reference(config) and config.algorithm.kl_placement == "reward")
