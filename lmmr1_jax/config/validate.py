"""Values that no run can use, refused before anything is loaded. What depends on the algorithm, the devices or the
model's images is checked where these are known: in `algorithms.registry`, `parallel.sharding`, `data.processor`."""

from __future__ import annotations

from lmmr1_jax.config.engine_arguments import VLLMS_RANGE, engine_arguments, in_vllms_range
from lmmr1_jax.config.fields import check_ranges
from lmmr1_jax.config.schema import RayConfig, RolloutConfig, TrainConfig, VllmConfig
from lmmr1_jax.runtime.errors import UserError


def check(config: TrainConfig) -> None:
    """Raises UserError, which names the field, its value and what it must be."""
    check_ranges(config)
    _check_sampler(config)
    if config.learner.minibatches > config.rollout.prompts:
        raise UserError(
            f"learner.minibatches is {config.learner.minibatches}; it must be at most rollout.prompts, "
            f"{config.rollout.prompts}, for groups are dealt to minibatches whole"
        )


def _check_sampler(config: TrainConfig) -> None:
    """What only engines of their own can do, or what they can't do together."""
    rollout, vllm = config.rollout, config.vllm
    if rollout.sampler == "jax":
        for group, default in (("vllm", VllmConfig()), ("ray", RayConfig())):
            for name, value in vars(getattr(config, group)).items():
                if value != getattr(default, name):
                    raise UserError(f"{group}.{name} is set, but rollout.sampler is jax, which does not read it")
        if rollout.staleness:
            raise UserError(
                "rollout.staleness is set, but the built-in sampler shares the learner's devices and cannot run ahead; "
                "it needs rollout.sampler vllm"
            )
    elif not in_vllms_range(rollout.temperature):
        raise UserError(
            f"rollout.temperature is {rollout.temperature!r}; with rollout.sampler vllm it must be {VLLMS_RANGE}"
        )
    if rollout.weight_update != RolloutConfig().weight_update and not rollout.staleness:
        raise UserError(
            "rollout.weight_update is set, but with rollout.staleness 0 nothing is being sampled during an update"
        )
    if vllm.colocate and rollout.staleness:
        raise UserError("vllm.colocate lets engines sleep while the learner works; rollout.staleness must be 0")
    if vllm.colocate and vllm.gpu_memory_utilization > 0.8:
        raise UserError(
            "vllm.colocate leaves the learner what vllm.gpu_memory_utilization does not take of each GPU; "
            f"{vllm.gpu_memory_utilization} is too much, 0.4 is a start"
        )
    engine_arguments(vllm)
    if vllm.label and not all(vllm.label.partition("=")):
        raise UserError(f"vllm.label is {vllm.label!r}; it must be NAME=VALUE")
