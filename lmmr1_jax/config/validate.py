"""Values that no run can use, refused before anything is loaded. What depends on the algorithm, the sampler, the
devices or the model's images is checked where these are known: in `algorithms.registry`, `rollout.sampler_registry`,
`parallel.sharding`, `data.processor`."""

from __future__ import annotations

import functools
import math

from lmmr1_jax.config.fields import field_types
from lmmr1_jax.config.schema import RolloutConfig, TrainConfig
from lmmr1_jax.runtime.errors import UserError

_RANGES = (
    (
        "at least 0",
        lambda value: value >= 0,
        "run.seed run.steps learner.learning_rate learner.weight_decay learner.row_length learner.rows "
        "learner.image_rows rollout.staleness vllm.kv_cache_gib vllm.max_images vllm.restarts eval.size eval.every "
        "eval.max_new_tokens tracking.samples tracking.images_every algorithm.kl_coefficient algorithm.kl_target "
        "algorithm.entropy_bonus algorithm.overlong_penalty algorithm.clip_low algorithm.clip_high "
        "algorithm.dynamic_sampling_rounds critic.learning_rate critic.value_clip critic.loss_weight "
        "critic.freezing_actor_steps",
    ),
    (
        "at least 1",
        lambda value: value >= 1,
        "data.epochs data.max_prompt_tokens data.workers rollout.prompts rollout.completions rollout.max_new_tokens "
        "vllm.num_engines vllm.tensor_parallel vllm.cpus vllm.max_num_seqs vllm.bucket_mib "
        "rewards.workers rewards.function_workers rewards.url_tries learner.epochs learner.minibatches "
        "learner.logprob_chunk checkpoint.every checkpoint.keep algorithm.importance_cap algorithm.aggregation_length",
    ),
    (
        "above 0",
        lambda value: value > 0,
        "rollout.temperature rollout.gap_warn rollout.gap_stop vllm.start_timeout vllm.sync_timeout "
        "vllm.request_timeout ray.timeout rewards.timeout rewards.function_timeout rewards.url_timeout "
        "rewards.url_wait learner.adam_eps learner.max_grad_norm algorithm.kl_horizon algorithm.reward_clip "
        "critic.max_grad_norm",
    ),
    ("above 0 and at most 1", lambda value: 0 < value <= 1, "vllm.gpu_memory_utilization"),
    (
        "from 0 to 1",
        lambda value: 0 <= value <= 1,
        "learner.warmup_ratio learner.min_learning_rate_ratio algorithm.discount algorithm.overlong_share "
        "algorithm.gae_lambda critic.warmup_ratio",
    ),
    ("0 or above 1", lambda value: value == 0 or value > 1, "algorithm.dual_clip"),
    ("from 0 to below 1", lambda value: 0 <= value < 1, "learner.adam_b1 learner.adam_b2"),
)
# Limits that may be no limit.
_MAY_BE_INFINITE = ("rollout.gap_warn", "rollout.gap_stop", "learner.max_grad_norm", "critic.max_grad_norm")


def check_ranges(config: TrainConfig) -> None:
    """Raises UserError, which names the field, its value and what it must be; NaN is outside every range."""
    for wanted, is_right, names in _RANGES:
        for name in names.split():
            value = functools.reduce(getattr, name.split("."), config)
            if value is not None and not is_right(value):
                raise UserError(f"{name} is {value!r}; it must be {wanted}")
    for name in field_types(TrainConfig):
        value = functools.reduce(getattr, name.split("."), config)
        if isinstance(value, float) and name not in _MAY_BE_INFINITE and not math.isfinite(value):
            raise UserError(f"{name} is {value!r}; it must be a finite number")
    if config.rollout.weight_update != RolloutConfig().weight_update and not config.rollout.staleness:
        raise UserError(
            "rollout.weight_update is set, but with rollout.staleness 0 nothing is being sampled during an update"
        )
    if config.learner.minibatches > config.rollout.prompts:
        raise UserError(
            f"learner.minibatches is {config.learner.minibatches}; it must be at most rollout.prompts, "
            f"{config.rollout.prompts}, for groups are dealt to minibatches whole"
        )
