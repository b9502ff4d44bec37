"""What the built-in sampler can't do, said before anything is loaded."""

from __future__ import annotations

from lmmr1_jax.config.schema import TrainConfig
from lmmr1_jax.runtime.errors import UserError


def check_local(config: TrainConfig) -> None:
    """Raises UserError for what the built-in sampler can't do."""
    if config.rollout.staleness:
        raise UserError(
            "rollout.staleness is set, but the built-in sampler shares the learner's devices and cannot run ahead; "
            "it needs rollout.sampler vllm"
        )
