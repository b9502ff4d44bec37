"""vLLM's engine as a sampler wants it: what it is told, and what of it can't be had."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import socket
from pathlib import Path
from typing import Any

from lmmr1_jax.rollout.engines.protocol import EngineConfigError, EngineSettings
from weights_bridge.vllm.plugin import AWAIT_WEIGHTS
from weights_bridge.vllm.private import build_engine

OLDEST_VLLM = (0, 32)
"""Older ones know other transports only, or none, or can't be told a version."""


def set_environment() -> None:
    """What vLLM reads of the environment, in this process and in its workers."""
    # In this very process: each step is then ours to take.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # Wherever there is Triton, so on every GPU, vLLM takes another runner, which refuses logits processors of
    # `BannedTokens`' kind. This is also the one that is tested.
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def build(settings: EngineSettings, folder: Path) -> Any:
    """vLLM's engine over the files in `folder` (config and tokenizer; weights come over the bridge)."""
    set_environment()
    try:
        import vllm
    except Exception as error:  # not there, or not to be had with the torch that is there
        raise EngineConfigError(
            f"vLLM can't be imported on {socket.gethostname()} ({one_line(error)}); "
            "requirements-sampler.txt installs it"
        ) from error
    if (numbers := re.match(r"(\d+)\.(\d+)", vllm.__version__)) and tuple(map(int, numbers.groups())) < OLDEST_VLLM:
        raise EngineConfigError(
            f"vLLM {vllm.__version__} on {socket.gethostname()} is too old to take weights: it must be 0.32"
        )
    from vllm.config import WeightTransferConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    arguments: dict[str, Any] = {
        "model": str(folder),
        "load_format": AWAIT_WEIGHTS,
        "dtype": settings.dtype,
        "seed": settings.seed,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "tensor_parallel_size": settings.tensor_parallel,
        "distributed_executor_backend": "mp" if settings.tensor_parallel > 1 else "uni",
        "enforce_eager": settings.enforce_eager,
        "enable_sleep_mode": settings.sleeps and not on_cpu,
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",
        "async_scheduling": False,
        "trust_remote_code": False,
        "disable_log_stats": True,
        "logits_processors": ["lmmr1_jax.rollout.engines.vllm.banned_tokens:BannedTokens"],
        "additional_config": {"banned_token_ids": list(settings.banned_ids)},
        "weight_transfer_config": WeightTransferConfig(backend=settings.backend),
    }
    if settings.max_images:
        arguments["limit_mm_per_prompt"] = {"image": settings.max_images, "video": 0}
        # Images come at their final size, a thin one thinner than vLLM would resize. The limits, both in pixels, say
        # for how large an image it makes room.
        edges = {"shortest_edge": 1, "longest_edge": settings.max_pixels}
        arguments["mm_processor_kwargs"] = {"size": edges, "do_resize": False}
    if settings.kv_cache_bytes:
        arguments["kv_cache_memory_bytes"] = settings.kv_cache_bytes
    else:
        arguments["gpu_memory_utilization"] = settings.gpu_memory_utilization
    known = [field.name for field in dataclasses.fields(EngineArgs)]
    for name in settings.arguments:
        if name not in known:
            hint = difflib.get_close_matches(name, known, 1)
            also = f"; did you mean {hint[0]}?" if hint else ""
            raise EngineConfigError(f"vllm.arguments: vLLM {vllm.__version__} has no argument {name!r}{also}")
    try:
        return build_engine(EngineArgs(**arguments | settings.arguments))
    except (TypeError, ValueError) as error:  # its own word for arguments that it refuses
        raise EngineConfigError(f"vLLM refuses its arguments: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """What an error says, for a message of one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
