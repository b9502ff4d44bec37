"""An engine without vLLM, for tests of the fleet: it has the actor's interface, takes weights and keeps their
version, and its groups say who asked for them. What goes wrong stands in the names of requests, or in its `fault`."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from typing import Any

import numpy as np

from lmmr1_jax.rollout.engines.protocol import (
    EngineConfigError,
    EngineFailed,
    EngineInfo,
    GroupRequest,
    RequestRefused,
    SampledCompletion,
)


class SmallEngine:
    """Completion i of request NAME is the bytes of "NAME/i". A request takes a millisecond a token.

    Faults: "late FILE" is built when the file is there, "never" never; "unfit" and "stillborn" can't be built;
    "raises", "dies" and "hangs" do so at the second bucket of an update; "mortal" dies of a request named "fatal".
    """

    def __init__(self, fault: str = ""):
        self._fault = fault
        self._version: int | None = None
        self._buckets = 0
        self._running = 0
        self._draining = self._updating = False

    async def built(self) -> EngineInfo:
        if self._fault == "unfit":
            raise EngineConfigError("no engine of this kind")
        if self._fault == "stillborn":
            raise EngineFailed("no room for a model")
        fault, _, file = self._fault.partition(" ")
        while fault == "never" or (fault == "late" and not os.path.exists(file)):
            await asyncio.sleep(0.02)
        return EngineInfo(socket.gethostname(), os.getpid(), "none")

    async def initialise(self, info: dict[str, Any]) -> None:
        """Nothing to compare."""

    async def generate(self, request: GroupRequest) -> list[SampledCompletion]:
        while self._draining or self._updating or self._version is None:
            await asyncio.sleep(0.005)
        if "poison" in request.name or ("fatal" in request.name and self._fault == "mortal"):
            os.kill(os.getpid(), signal.SIGKILL)
        if "refused" in request.name:
            raise RequestRefused(f"vLLM refuses {request.name}")
        self._running += 1
        versions = []
        for _ in range(request.max_new_tokens):
            await asyncio.sleep(0.001)
            while self._updating:
                await asyncio.sleep(0.005)
            versions.append(self._version)
        self._running -= 1
        texts = [f"{request.name}/{number}".encode() for number in range(request.completions)]
        return [
            SampledCompletion(
                token_ids=np.frombuffer(text, np.uint8).astype(np.int32),
                log_probs=np.zeros(len(text), np.float32),
                finish_reason="length",
                policy_version=np.asarray(versions, np.int32),
            )
            for text in texts
        ]

    async def begin_update(self, in_flight: bool) -> None:
        self._draining = not in_flight
        while self._draining and self._running:
            await asyncio.sleep(0.005)
        self._draining, self._updating, self._buckets = False, True, 0

    async def receive(self, places: list[tuple[str, int]], bucket: list[Any]) -> None:
        await bucket[0]
        self._buckets += 1
        if self._buckets == 2 and self._fault == "raises":
            raise EngineFailed("no room for this bucket")
        if self._buckets == 2 and self._fault == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if self._buckets == 2 and self._fault == "hangs":
            os.kill(os.getpid(), signal.SIGSTOP)

    async def sleep(self) -> None:
        self._version = None

    async def close(self) -> None:
        """Nothing to put away."""

    async def finish_update(self, version: int) -> None:
        assert self._buckets == 3
        self._version, self._updating = version, False
