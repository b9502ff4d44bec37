"""Values that no run can use, refused before anything is loaded. What depends on the algorithm, the devices or the
model's pictures is checked where these are known: in `algorithms.registry`, `learner.sharding`, `data.processor`."""

from __future__ import annotations

import functools
import math

from lmmr1_jax.config import TrainConfig
from lmmr1_jax.config_fields import field_types
from lmmr1_jax.errors import UserError

_RANGES = (
    (
        "at least 0",
        lambda value: value >= 0,
        "run.seed run.steps learner.learning_rate learner.weight_decay learner.row_length learner.rows "
        "learner.picture_rows eval.size eval.every eval.max_new_tokens tracking.samples tracking.pictures_every",
    ),
    (
        "at least 1",
        lambda value: value >= 1,
        "data.epochs data.max_prompt_tokens data.workers rollout.prompts rollout.completions rollout.max_new_tokens "
        "rewards.workers learner.epochs learner.minibatches learner.logprob_chunk checkpoint.every checkpoint.keep",
    ),
    (
        "above 0",
        lambda value: value > 0,
        "rollout.temperature rollout.gap_warn rollout.gap_stop rewards.timeout learner.adam_eps learner.max_grad_norm",
    ),
    ("from 0 to 1", lambda value: 0 <= value <= 1, "learner.warmup_ratio learner.min_learning_rate_ratio"),
    ("from 0 to below 1", lambda value: 0 <= value < 1, "learner.adam_b1 learner.adam_b2"),
)
# Limits that may be no limit.
_MAY_BE_INFINITE = ("rollout.gap_warn", "rollout.gap_stop", "learner.max_grad_norm")


def check_ranges(config: TrainConfig) -> None:
    """Raises UserError, which names the field, its value and what it must be; NaN is outside every range."""
    for wanted, is_right, names in _RANGES:
        for name in names.split():
            value = functools.reduce(getattr, name.split("."), config)
            if not is_right(value):
                raise UserError(f"{name} is {value!r}; it must be {wanted}")
    for name, kind in field_types(TrainConfig).items():
        value = functools.reduce(getattr, name.split("."), config)
        if kind is float and name not in _MAY_BE_INFINITE and not math.isfinite(value):
            raise UserError(f"{name} is {value!r}; it must be a finite number")
    if config.learner.minibatches > config.rollout.prompts:
        raise UserError(
            f"learner.minibatches is {config.learner.minibatches}; it must be at most rollout.prompts, "
            f"{config.rollout.prompts}, for groups are dealt to minibatches whole"
        )
