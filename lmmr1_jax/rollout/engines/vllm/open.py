"""vLLM engines from a config: where they run, what each is told, how weights travel to them."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lmmr1_jax.config.schema import TrainConfig
from lmmr1_jax.data.processor import Processor
from lmmr1_jax.models.network import Network
from lmmr1_jax.rollout.engines.fleet import Fleet, FleetSettings
from lmmr1_jax.rollout.engines.ray_cluster import connected, reserved
from lmmr1_jax.rollout.engines.sampler import VllmSampler
from lmmr1_jax.rollout.engines.transport import choose_transport, init_info
from lmmr1_jax.rollout.engines.vllm.settings import engine_settings, prompt_limits
from lmmr1_jax.rollout.loaded_model import LoadedModel
from lmmr1_jax.runtime.errors import UserError
from weights_bridge.stream import TensorStream
from weights_bridge.tensor_table import layout

_log = logging.getLogger(__name__)

ENGINE_FILES = ("*.json", "*.txt", "*.jinja")
"""What an engine needs of the model's folder: everything but weights."""


@contextlib.contextmanager
def open_vllm(
    config: TrainConfig,
    load_model: Callable[[], LoadedModel],
    *,
    max_num_seqs: int | None = None,
    resumed_at: int = 0,
    check: Callable[[], None] = lambda: None,
) -> Iterator[tuple[LoadedModel, VllmSampler]]:
    """The model with its sampler; arguments as in `sampler_registry.OpenSampler`.

    Raises:
      UserError: Ray or vLLM is not there, the cluster does not answer, or has no room or no GPU.
    """
    if max_num_seqs is not None:
        config = dataclasses.replace(config, vllm=dataclasses.replace(config.vllm, max_num_seqs=max_num_seqs))
    # Ray first: it starts processes, which a process that runs JAX should not.
    with connected(config.ray, cpus=config.vllm.num_engines * config.vllm.cpus, check=check):
        model = load_model()
        parts = (config, model.processor, model.network, model.source)
        with open_engines(*parts, resumed_at=resumed_at, check=check) as sampler:
            yield model, sampler


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
    limits = prompt_limits(config, network.config.text.max_position_embeddings)
    settings = engine_settings(config, processor, limits, on_gpu=on_gpu, backend=transport.backend)
    files = {path.name: path.read_bytes() for pattern in ENGINE_FILES for path in sorted(source.glob(pattern))}
    files.pop("model.safetensors.index.json", None)
    actor = ray.remote(EngineActor)

    def make_engine(slot: int, made_before: int) -> Any:
        # Not the same random numbers again: a replaced engine would repeat what it sampled.
        numbers = np.random.SeedSequence((config.run.seed % 2**32, resumed_at, slot, made_before))
        seed = int(numbers.generate_state(1)[0]) >> 1  # 31 bits
        options = slots.options(slot) | {"max_concurrency": 10_000, "max_restarts": 0}
        return actor.options(**options).remote(dataclasses.replace(settings, seed=seed), files)

    entries = layout(network.config)

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
    announced = init_info(network.config, stream(network.abstract_params))
    room = dict(label=config.vllm.label, timeout=config.ray.timeout, check=check)
    with reserved(bundle, config.vllm.num_engines, **room) as slots:
        with contextlib.closing(Fleet(bounds, make_engine, transport, announced, check=check)) as fleet:
            merge_size = processor.config.vision.spatial_merge_size if processor.config.vision else 1
            yield VllmSampler(fleet, stream, settings, merge_size, limits)


def _on_gpu(config: TrainConfig) -> bool:
    import ray

    gpus = ray.cluster_resources().get("GPU", 0)
    if config.vllm.device == "gpu" and not gpus and not config.ray.address:  # nodes may still be coming
        raise UserError("vllm.device is gpu, but the Ray cluster has no GPU")
    return bool(gpus) if config.vllm.device == "auto" else config.vllm.device == "gpu"
