"""Engines from a config: where they run, what each is told, how weights travel to them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lmmr1_jax.config.engine_arguments import engine_arguments
from lmmr1_jax.config.schema import TrainConfig, VllmConfig
from lmmr1_jax.data.processor import Processor
from lmmr1_jax.models.network import Network
from lmmr1_jax.rollout.engines.fleet import Fleet, FleetSettings
from lmmr1_jax.rollout.engines.protocol import EngineSettings
from lmmr1_jax.rollout.engines.ray_cluster import reserved
from lmmr1_jax.rollout.engines.sampler import VllmSampler
from lmmr1_jax.rollout.sampler import SamplerLimits
from lmmr1_jax.runtime.errors import UserError
from weights_bridge.errors import TransportError
from weights_bridge.stream import TensorStream
from weights_bridge.tensor_table import layout
from weights_bridge.transports.host import HostTransport

_log = logging.getLogger(__name__)


ENGINE_FILES = ("*.json", "*.txt", "*.jinja")
"""What an engine needs of the model's folder: everything but weights."""
CPU_KV_CACHE_GIB = 1.0
MAX_IMAGE_SLACK = 1 << 20
"""Pixels: an image enlarged to the lower limit may lie above the upper one by less than this."""


@contextlib.contextmanager
def open_engines(
    config: TrainConfig,
    processor: Processor,
    network: Network,
    source: Path,
    *,
    resumed_at: int = 0,
    check: Callable[[], None] = lambda: None,
) -> Iterator[VllmSampler]:
    """Engines for the model in `source`, which end with the context. They have no weights yet. Ray must be connected.

    Args:
      config: reads `vllm`, `ray`, `rollout`, `eval`, `data` and `run.seed`.
      processor: the model's.
      network: the model.
      source: its folder.
      resumed_at: the step that the run goes on from: the engines don't draw again what they drew at its start.
      check: called while engines are waited for; what it raises ends the waiting.

    Raises:
      UserError: no room on the cluster, or no GPU where one is asked for.
    """
    import ray

    from lmmr1_jax.rollout.engines.vllm.actor import EngineActor

    on_gpu = _on_gpu(config)
    bundle: dict[str, float] = {"CPU": config.vllm.cpus}
    if on_gpu:
        bundle["GPU"] = config.vllm.tensor_parallel
    if config.vllm.resource:
        bundle[config.vllm.resource] = 0.001
    transport = choose_transport(config.vllm, check, on_gpu=on_gpu)
    _log.info("weights travel by %s", transport.name)
    raw_config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    limits = prompt_limits(config, raw_config)
    settings = engine_settings(config, processor, limits, on_gpu=on_gpu, backend=transport.backend)
    files = {path.name: path.read_bytes() for pattern in ENGINE_FILES for path in sorted(source.glob(pattern))}
    files.pop("model.safetensors.index.json", None)
    actor = ray.remote(EngineActor)

    def make_engine(place: int, made_before: int) -> Any:
        # Not the same random numbers again: a replaced engine would repeat what it sampled.
        numbers = np.random.SeedSequence((config.run.seed % 2**32, resumed_at, place, made_before))
        seed = int(numbers.generate_state(1)[0]) >> 1  # 31 bits
        options = places.options(place) | {"max_concurrency": 10_000, "max_restarts": 0}
        return actor.options(**options).remote(dataclasses.replace(settings, seed=seed), files)

    entries = layout(raw_config)

    def stream(params: Mapping[str, Any]) -> TensorStream:
        dtype = np.dtype(settings.dtype)  # jax registers bfloat16 with NumPy
        return TensorStream(params, entries, dtype=dtype, bucket_bytes=transport.stream_bytes, for_engines=True)

    bounds = FleetSettings(
        engines=config.vllm.num_engines,
        max_num_seqs=config.vllm.max_num_seqs,
        start_timeout=config.vllm.start_timeout,
        sync_timeout=config.vllm.sync_timeout,
        request_timeout=config.vllm.request_timeout,
        restarts=config.vllm.restarts,
    )
    introduction = init_info(raw_config, stream(network.abstract_params))
    room = dict(label=config.vllm.label, timeout=config.ray.timeout, check=check)
    with reserved(bundle, config.vllm.num_engines, **room) as places:
        with contextlib.closing(Fleet(bounds, make_engine, transport, introduction, check=check)) as fleet:
            merge_size = processor.config.vision.spatial_merge_size if processor.config.vision else 1
            yield VllmSampler(fleet, stream, settings, merge_size, limits)


def _longest_completion(config: TrainConfig) -> int:
    return max(config.rollout.max_new_tokens, config.eval.max_new_tokens)


def prompt_limits(config: TrainConfig, raw_config: Mapping[str, Any]) -> SamplerLimits:
    """The prompts that engines take: those that leave a completion its room in the model's positions.

    Args:
      config: reads `rollout`, `eval` and `vllm`.
      raw_config: the contents of config.json.

    Raises:
      UserError: there are none.
    """
    text = raw_config.get("text_config") or raw_config
    positions = text.get("max_position_embeddings", raw_config.get("max_position_embeddings"))
    new_tokens = _longest_completion(config)
    if positions is not None and positions <= new_tokens:
        raise UserError(
            f"rollout.max_new_tokens or eval.max_new_tokens is {new_tokens}, but the model has only {positions} "
            "positions for a prompt with its completion"
        )
    return SamplerLimits(None if positions is None else positions - new_tokens, config.vllm.max_images)


def choose_transport(config: VllmConfig, check: Callable[[], None] = lambda: None, *, on_gpu: bool) -> Any:
    """How weights travel, to engines on GPUs or on CPUs.

    Raises:
      UserError: these engines can't take them so.
      TransportError: this learner can't send them so.
    """
    if config.transport in ("nccl", "ipc") and not on_gpu:
        raise UserError(f"vllm.transport {config.transport} needs engines on GPUs, and these run on CPUs; use host")
    limits = {"bucket_bytes": config.bucket_mib << 20, "timeout": config.sync_timeout, "check": check}
    if config.transport == "nccl":
        from weights_bridge.transports.nccl import NcclTransport

        return NcclTransport(ranks_per_engine=config.tensor_parallel, **limits)
    if config.transport == "ipc":
        try:
            from weights_bridge.transports.ipc import IpcTransport
        except ImportError as error:  # torch is none of the learner's packages
            raise TransportError(f"the ipc transport needs a torch with CUDA beside JAX: {error}") from None

        return IpcTransport(**limits)
    return HostTransport(**limits)


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


def init_info(config: Mapping[str, Any], stream: TensorStream) -> dict[str, Any]:
    """The learner's model, for the receiving end to compare its own with.

    Args:
      config: the contents of config.json.
      stream: what each update will send.
    """
    text = config.get("text_config") or config
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "tie_word_embeddings")
    model = {name: text.get(name, config.get(name)) for name in names} | {"model_type": config["model_type"]}
    return {"model": model, "tensors": {spec.name: [spec.dtype.name, list(spec.shape)] for spec in stream.specs}}


def _on_gpu(config: TrainConfig) -> bool:
    import ray

    gpus = ray.cluster_resources().get("GPU", 0)
    if config.vllm.device == "gpu" and not gpus and not config.ray.address:  # nodes may still be coming
        raise UserError("vllm.device is gpu, but the Ray cluster has no GPU")
    return bool(gpus) if config.vllm.device == "auto" else config.vllm.device == "gpu"
