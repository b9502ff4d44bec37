"""Values that no run can use, refused before anything is loaded. What depends on the algorithm, the sampler, the
devices or the model's images is checked where these are known: in `algorithms.registry`, `rollout.sampler_registry`,
`parallel.sharding`, `data.processor`."""

from __future__ import annotations

from lmmr1_jax.config.fields import check_ranges
from lmmr1_jax.config.schema import RolloutConfig, TrainConfig
from lmmr1_jax.runtime.errors import UserError


def check(config: TrainConfig) -> None:
    """Raises UserError, which names the field, its value and what it must be."""
    check_ranges(config)
    if config.rollout.weight_update != RolloutConfig().weight_update and not config.rollout.staleness:
        raise UserError(
            "rollout.weight_update is set, but with rollout.staleness 0 nothing is being sampled during an update"
        )
    if config.learner.minibatches > config.rollout.prompts:
        raise UserError(
            f"learner.minibatches is {config.learner.minibatches}; it must be at most rollout.prompts, "
            f"{config.rollout.prompts}, for groups are dealt to minibatches whole"
        )
