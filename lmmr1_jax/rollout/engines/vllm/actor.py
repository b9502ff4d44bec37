"""The engine as a Ray actor: a process of its own, on whatever machine Ray chose. No JAX, and vLLM only when made."""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
from pathlib import Path
from typing import Any

from lmmr1_jax.rollout.engines.protocol import EngineInfo, EngineSettings, GroupRequest, SampledCompletion
from lmmr1_jax.rollout.engines.ray_private import pickled
from weights_bridge.vllm import cpu_compat


class EngineActor:
    """`ray.remote(EngineActor)`; all methods are asynchronous, so that groups, updates and questions don't queue up."""

    def __init__(self, settings: EngineSettings, files: dict[str, bytes]):
        """
        Args:
          settings: the engine's.
          files: config and tokenizer by file name: this machine needs no copy of the model.
        """
        _prepare_process(settings)
        self._folder = tempfile.TemporaryDirectory(prefix="lmmr1-engine-")
        for name, content in files.items():
            Path(self._folder.name, name).write_bytes(content)
        from lmmr1_jax.rollout.engines.vllm.engine import Engine

        self._apart = settings.tensor_parallel > 1
        self._engine = Engine(settings, Path(self._folder.name))

    async def built(self) -> EngineInfo:
        """Returns when the engine can take weights."""
        await asyncio.wrap_future(self._engine.built)
        import vllm

        return EngineInfo(host=socket.gethostname(), pid=os.getpid(), software=f"vLLM {vllm.__version__}")

    async def generate(self, request: GroupRequest) -> list[SampledCompletion]:
        """A group's completions, in order."""
        return await asyncio.wrap_future(self._engine.generate(request))

    async def initialise(self, info: dict[str, Any]) -> None:
        """See `Engine.initialise`."""
        await asyncio.wrap_future(self._engine.initialise(info))

    async def begin_update(self, in_flight: bool) -> None:
        """See `Engine.begin_update`."""
        await asyncio.wrap_future(self._engine.begin_update(in_flight=in_flight))

    async def update(self, info: dict[str, Any]) -> None:
        """What the learner's transport says of what comes now, as vLLM's `update_weights` takes it."""
        await asyncio.wrap_future(self._engine.receive(info))

    async def receive(self, places: list[tuple[str, int]], bucket: list[Any]) -> None:
        """One bucket through the object store; `bucket` holds the reference, so that Ray does not fetch it first.

        Workers that are processes of their own get the reference and read the same memory.
        """
        import ray

        if not self._apart:
            info = {"places": places, "arrays": await bucket[0]}
            await asyncio.wrap_future(self._engine.receive(info))
            return
        address = ray.get_runtime_context().gcs_address
        with pickled(bucket[0]) as reference:
            info = {"places": places, "reference": reference, "ray_address": address}
            await asyncio.wrap_future(self._engine.receive(info))

    async def finish_update(self, version: int) -> None:
        """See `Engine.finish_update`."""
        await asyncio.wrap_future(self._engine.finish_update(version))

    async def sleep(self) -> None:
        """See `Engine.sleep`."""
        await asyncio.wrap_future(self._engine.sleep())

    async def close(self) -> None:
        """Leaves nothing on this machine's disk; the process may then be killed."""
        self._folder.cleanup()


def _prepare_process(settings: EngineSettings) -> None:
    """What must hold before vLLM is first imported, here and in the processes that it starts."""
    # Every sync makes each tensor anew on the way to its place; huge pages are the cheaper ones on a CPU.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if settings.cpu_threads:
        cpu_compat.activate()
        os.environ["OMP_NUM_THREADS"] = str(settings.cpu_threads)
        if settings.tensor_parallel > len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))):
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else vLLM wants a NUMA node for each worker
