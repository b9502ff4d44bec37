"""What a vLLM engine is told, and which prompts it then takes, from a run's config."""

from __future__ import annotations

from lmmr1_jax.config.schema import TrainConfig
from lmmr1_jax.data.processor import Processor
from lmmr1_jax.rollout.engines.protocol import EngineSettings
from lmmr1_jax.rollout.engines.vllm.arguments import engine_arguments
from lmmr1_jax.rollout.sampler import SamplerLimits
from lmmr1_jax.runtime.errors import UserError

CPU_KV_CACHE_GIB = 1.0
MAX_IMAGE_SLACK = 1 << 20
"""Pixels: an image enlarged to the lower limit may lie above the upper one by less than this."""


def prompt_limits(config: TrainConfig, positions: int | None) -> SamplerLimits:
    """The prompts that engines take: those that leave a completion its room in the model's positions.

    Args:
      config: reads `rollout`, `eval` and `vllm`.
      positions: those that the model knows; None where its config.json does not say.

    Raises:
      UserError: there are none.
    """
    new_tokens = _longest_completion(config)
    if positions is not None and positions <= new_tokens:
        raise UserError(
            f"rollout.max_new_tokens or eval.max_new_tokens is {new_tokens}, but the model has only {positions} "
            "positions for a prompt with its completion"
        )
    return SamplerLimits(None if positions is None else positions - new_tokens, config.vllm.max_images)


def engine_settings(
    config: TrainConfig, processor: Processor, limits: SamplerLimits, *, on_gpu: bool, backend: str
) -> EngineSettings:
    """What an engine is told, from the run's config."""
    longest_prompt = min(processor.max_prompt_tokens, limits.max_prompt_tokens or processor.max_prompt_tokens)
    dtype = config.vllm.dtype
    if dtype == "auto":
        dtype = "bfloat16" if on_gpu else "float32"
    kv_cache_gib = config.vllm.kv_cache_gib or (0.0 if on_gpu else CPU_KV_CACHE_GIB)
    return EngineSettings(
        dtype=dtype,
        tensor_parallel=config.vllm.tensor_parallel,
        max_num_seqs=config.vllm.max_num_seqs,
        max_model_len=longest_prompt + _longest_completion(config),
        gpu_memory_utilization=config.vllm.gpu_memory_utilization,
        kv_cache_bytes=int(kv_cache_gib * 2**30),
        enforce_eager=config.vllm.enforce_eager or not on_gpu,
        sleeps=config.vllm.colocate and on_gpu,
        seed=config.run.seed,
        banned_ids=tuple(int(i) for i in processor.banned_ids),
        end_ids=tuple(int(i) for i in processor.end_ids),
        max_images=config.vllm.max_images if processor.config.vision else 0,
        max_pixels=config.data.max_pixels + MAX_IMAGE_SLACK,
        backend=backend,
        cpu_threads=0 if on_gpu else config.vllm.cpus,
        arguments=engine_arguments(config.vllm),
    )


def _longest_completion(config: TrainConfig) -> int:
    return max(config.rollout.max_new_tokens, config.eval.max_new_tokens)
