"""What an algorithm is: how rewards become advantages, the loss that they weigh, and what it reads of the config.

A file of an algorithm exports `ALGORITHM`; `registry.py` collects those that ship, and `algorithm.file` names another:

    from lmmr1_jax.algorithms.algorithm import Algorithm
    from lmmr1_jax.algorithms.policy_losses import clip

    ALGORITHM = Algorithm("mine", advantages=advantages, loss=clip, defaults={"aggregation": "sequence"})
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from lmmr1_jax.algorithms.loss_inputs import LossInputs
from lmmr1_jax.config.fields import describe_type, field_ranges, field_types, has_type
from lmmr1_jax.config.schema import AlgorithmConfig
from lmmr1_jax.types.records import Rollout

PerToken = Float[Array, "rows slots"]
PolicyLoss = Callable[[LossInputs, AlgorithmConfig], tuple[PerToken, PerToken]]
"""Called inside jit with a micro-batch and the resolved config. Returns every token's loss, and 1 where something holds
it back (the metric `clip_fraction`), else 0. It must be finite and may be anything at padding slots."""

Advantages = Callable[[Sequence[Rollout], AlgorithmConfig, Sequence[np.ndarray] | None], list[Rollout]]
AdvantagesAndReturns = Callable[
    [Sequence[Rollout], AlgorithmConfig, Sequence[np.ndarray] | None, Sequence[np.ndarray]],
    tuple[list[Rollout], list[np.ndarray]],
]

READ_BY_ADVANTAGES = (
    "discount", "gae_lambda", "kl_placement", "normalize_advantages", "normalize_rewards", "normalize_std",
    "reward_clip",
)  # fmt: skip
READ_BY_LOSSES = ("clip_high", "clip_low", "dual_clip")

_DEFAULTS: Mapping[str, Any] = {
    "clip_low": 0.2,
    "clip_high": 0.2,
    "aggregation": "token",
    "normalize_advantages": "none",
    "kl_estimator": "k3",
    "kl_placement": "loss",
    "reward_clip": None,
    "overlong_share": 0.0,
    "dynamic_sampling_rounds": 0,
}


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """An algorithm, from rewards to the loss.

    Attributes:
      name: what `algorithm.name` says.
      advantages: `advantages(rollouts, config, log_ratios)` returns the rollouts of a step with their advantages,
        float32 `[tokens]` for every completion; NumPy on the host, `config` resolved. `log_ratios` are policy minus
        reference log-probs, `[tokens]` per completion, groups one after the other, where `kl_placement` is "reward"
        and the KL's coefficient is above 0, else None. With a critic it is called with the critic's `values` too,
        `[tokens]` per completion, and returns a pair: the rollouts, and the returns that the critic is fitted to,
        float32 in the same form.
      loss: a function (`PolicyLoss`) or the name of one, as `algorithm.loss` has them.
      defaults: its own values of fields that are None in `AlgorithmConfig`; those left out are clip_low and
        clip_high 0.2, aggregation "token", normalize_advantages "none", kl_estimator "k3", kl_placement "loss",
        no reward_clip, overlong_share 0 and dynamic_sampling_rounds 0. `loss` is no default but the attribute.
      reads: the fields of `READ_BY_ADVANTAGES` that its advantages read (`shaping.READS` are those of
        `shaped_advantages`), and those of `READ_BY_LOSSES` that a loss function of its own reads. Setting another of
        them is refused. All other fields are read for every algorithm, by what stands around it.
      smallest_group: completions per prompt that it needs.
      critic: whether it has one.

    Raises:
      ValueError: `defaults` or `reads` names a field that can't stand there, or a value that it can't have.
    """

    name: str
    advantages: Advantages | AdvantagesAndReturns
    loss: PolicyLoss | str
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    reads: Collection[str] = ()
    smallest_group: int = 2
    critic: bool = False

    def __post_init__(self):
        if not isinstance(self.name, str) or not self.name.isidentifier():
            raise ValueError(f"name is {self.name!r}; it must be a word of letters, digits and underscores")
        for attribute in ("advantages", "loss"):
            if not callable(getattr(self, attribute)) and not (attribute == "loss" and isinstance(self.loss, str)):
                raise ValueError(f"{attribute} is {getattr(self, attribute)!r}; it must be a function")
        known = (*READ_BY_ADVANTAGES, *READ_BY_LOSSES)
        if strange := sorted(set(self.reads) - set(known)):
            raise ValueError(f"reads has {strange[0]!r}; it may have {', '.join(known)}")
        types, ranges = field_types(AlgorithmConfig), field_ranges(AlgorithmConfig)
        for field, value in self.defaults.items():
            if field not in _DEFAULTS:
                raise ValueError(f"defaults has {field!r}; it may have {', '.join(_DEFAULTS)}")
            if field in READ_BY_ADVANTAGES and field not in self.reads and value != _DEFAULTS[field]:
                raise ValueError(f"defaults has {field!r}, which its reads have not")
            if not has_type(value, types[field]):
                raise ValueError(f"defaults: {field} is {value!r}; it must be {describe_type(types[field])}")
            if isinstance(value, int | float) and (wanted := ranges[field].missed_by(value)):
                raise ValueError(f"defaults: {field} is {value!r}; it must be {wanted}")

    @property
    def filled_in(self) -> dict[str, Any]:
        """What stands in the fields where the config has None; without `loss`."""
        return {**_DEFAULTS, **self.defaults}
