"""The algorithms by name, what each of them reads, and what a run must compute for them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lmmr1_jax.algorithms import dr_grpo, grpo, ppo, reinforce_pp, reinforce_pp_baseline, rloo, rloo_lmm_r1
from lmmr1_jax.config.schema import AlgorithmConfig, CriticConfig, TrainConfig
from lmmr1_jax.runtime.errors import UserError
from lmmr1_jax.types.records import Rollout

_log = logging.getLogger(__name__)

Advantages = Callable[[Sequence[Rollout], AlgorithmConfig, Sequence[np.ndarray] | None], list[Rollout]]
AdvantagesAndReturns = Callable[
    [Sequence[Rollout], AlgorithmConfig, Sequence[np.ndarray] | None, Sequence[np.ndarray]],
    tuple[list[Rollout], list[np.ndarray]],
]


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """A row of the table: how rewards become advantages, and what the config's fields are where they are None.

    Attributes:
      name: what `algorithm.name` says.
      advantages: pure NumPy function over groups; its config is resolved. With a critic it takes the values of the
        completions' tokens too, and gives the returns beside the rollouts.
      smallest_group: completions per prompt that its baseline needs.
      loss, clip (low and high), aggregation, normalize (advantages), kl (estimator and placement), reward_clip,
        overlong (share), dynamic (sampling rounds): its own values of the fields.
      critic: whether it has one.
    """

    name: str
    advantages: Advantages | AdvantagesAndReturns
    smallest_group: int
    loss: str
    clip: tuple[float, float]
    aggregation: str
    normalize: str
    kl: tuple[str, str]
    reward_clip: float | None = None
    overlong: float = 0.0
    dynamic: int = 0
    critic: bool = False

    @property
    def own(self) -> dict[str, Any]:
        """The fields that it fills in where the config has None."""
        return {
            "loss": self.loss,
            "clip_low": self.clip[0],
            "clip_high": self.clip[1],
            "aggregation": self.aggregation,
            "normalize_advantages": self.normalize,
            "kl_estimator": self.kl[0],
            "kl_placement": self.kl[1],
            "reward_clip": self.reward_clip,
            "overlong_share": self.overlong,
            "dynamic_sampling_rounds": self.dynamic,
        }


_PPO, _DAPO, _GSPO, _CISPO = (0.2, 0.2), (0.2, 0.28), (3e-4, 4e-4), (1.0, 4.0)
_K1, _K2, _K3 = ("k1", "reward"), ("k2", "loss"), ("k3", "loss")
_TABLE = (
    #         name                     advantages                  group loss     clip    average     normalize KL
    Algorithm("ppo",                   ppo.advantages_and_returns,       1, "clip",  _PPO,   "token",    "batch", _K1,
              critic=True),
    Algorithm("rloo",                  rloo.advantages,                  2, "clip",  _PPO,   "token",    "none",  _K1),
    Algorithm("rloo_lmm_r1",           rloo_lmm_r1.advantages,           2, "clip",  _PPO,   "token",    "batch", _K1,
              reward_clip=10.0),
    Algorithm("reinforce_pp",          reinforce_pp.advantages,          1, "clip",  _PPO,   "token",    "batch", _K1),
    Algorithm("reinforce_pp_baseline", reinforce_pp_baseline.advantages, 2, "clip",  _PPO,   "token",    "batch", _K2),
    Algorithm("grpo",                  grpo.advantages,                  2, "clip",  _PPO,   "sequence", "group", _K3),
    Algorithm("dr_grpo",               dr_grpo.advantages,               2, "clip",  _PPO,   "constant", "none",  _K3),
    Algorithm("dapo",                  grpo.advantages,                  2, "clip",  _DAPO,  "token",    "group", _K3,
              overlong=0.2, dynamic=4),
    Algorithm("gspo",                  grpo.advantages,                  2, "gspo",  _GSPO,  "sequence", "group", _K3),
    Algorithm("cispo",                 grpo.advantages,                  2, "cispo", _CISPO, "token",    "group", _K3),
)  # fmt: skip
ALGORITHMS: dict[str, Algorithm] = {a.name: a for a in _TABLE}

# Fields that some algorithms do not read at all.
_READ_BY = {
    "discount": ("ppo", "rloo_lmm_r1", "reinforce_pp"),
    "gae_lambda": ("ppo",),
    "reward_clip": tuple(name for name in ALGORITHMS if name != "rloo"),
}
# Fields that mean something only beside others: field, the other, the values of it that read the field, in words.
_Read = tuple[str, str, Callable[[Any], bool], str]
_READ_WITH: tuple[_Read, ...] = (
    ("clip_low", "loss", lambda loss: loss != "policy_gradient", "another loss than policy_gradient"),
    ("clip_high", "loss", lambda loss: loss != "policy_gradient", "another loss than policy_gradient"),
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


def algorithm(name: str) -> Algorithm:
    """The algorithm of that name; UserError that lists the names when there is none."""
    if name not in ALGORITHMS:
        raise UserError(f"algorithm.name is {name!r}; known are {', '.join(sorted(ALGORITHMS))}")
    return ALGORITHMS[name]


def resolved(config: TrainConfig) -> TrainConfig:
    """The config with the algorithm's own values where fields are None; the same again if they are filled in."""
    given = config.algorithm
    own = {name: value for name, value in algorithm(given.name).own.items() if getattr(given, name) is None}
    filled = dataclasses.replace(given, **own)
    if filled.aggregation == "constant" and filled.aggregation_length is None:
        filled = dataclasses.replace(filled, aggregation_length=config.rollout.max_new_tokens)
    return dataclasses.replace(config, algorithm=filled)


def checked(config: TrainConfig) -> TrainConfig:
    """The resolved config; refuses, with a UserError, what the algorithm cannot do or would silently not read."""
    chosen = algorithm(config.algorithm.name)
    given, filled = config.algorithm, resolved(config).algorithm
    for field, readers in _READ_BY.items():
        if chosen.name not in readers and _is_set(given, field):
            raise UserError(
                f"algorithm.{field} is set, but {chosen.name} does not read it (only {', '.join(readers)} "
                f"{'do' if len(readers) > 1 else 'does'})"
            )
    for field, other, is_read, wanted in _READ_WITH:
        is_own = getattr(given, field) == chosen.own.get(field)  # written out, as in the `config.json` of a run
        if _is_set(given, field) and not is_own and not is_read(getattr(filled, other)):
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
    return algorithm(config.algorithm.name).critic


def needs_old(config: TrainConfig) -> bool:
    """Whether policy log-probs have to be computed by a pass of their own before the first update.

    With one update per rollout the ratio divides by the same forward pass, gradient stopped. The KL in the reward
    needs the log-probs before there are advantages.
    """
    in_reward = needs_reference(config) and resolved(config).algorithm.kl_placement == "reward"
    return in_reward or updates_per_rollout(config) > 1


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
