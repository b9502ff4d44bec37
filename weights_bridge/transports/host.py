"""The learner's side of the `host` transport: buckets go through Ray's object store, whatever the two sides are.

A bucket is put into the store of the learner's machine once; every machine with engines fetches it once, however many
engines it holds, and they read it where it lies. Needs Ray, neither torch nor vLLM.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from weights_bridge.stream import TensorStream
from weights_bridge.vllm.plugin import HOST_BACKEND

POLL_SECONDS = 0.5
AHEAD = 2
"""Parts that are sent before the oldest of them must have been taken by all engines."""


@dataclasses.dataclass
class SendTimes:
    """Seconds of a send in which the learner's process made tensors, and put them into the store; the rest it waits."""

    make: float = 0.0
    put: float = 0.0


class HostTransport:
    """Sends a stream of tensors into engines.

    The learner's host holds less than two buckets beside the parameters, a bucket being the setting or the largest
    tensor, whichever is larger. What travels is therefore an eighth of the setting at a time, and larger tensors in
    parts. One part is being made and `AHEAD` lie in the store for engines to read; for a moment there are also those
    that the store has not dropped yet, or that wait in an engine for the other tensors of a fused layer. From an
    accelerator a tensor comes to the host whole, and what comes next with it.

    Attributes:
      name: for the log.
      backend: the weight-transfer engine that vLLM must be told to use.
      owns_init: whether `send` initialises the engines; here their owner does, once.
      times: of the last send.
    """

    name = "host"
    backend = HOST_BACKEND
    owns_init = False

    def __init__(
        self,
        *,
        bucket_bytes: int = 256 << 20,
        timeout: float = 600.0,
        check: Callable[[], None] = lambda: None,
    ):
        """
        Args:
          bucket_bytes: memory that a bucket may take.
          timeout: seconds after which an engine that does not take its bucket counts as lost.
          check: called again and again while engines are waited for; what it raises ends the sending.
        """
        self._check = check
        self._bucket_bytes = bucket_bytes
        self._timeout = timeout
        self.times = SendTimes()

    @property
    def stream_bytes(self) -> int:
        """What a stream's `bucket_bytes` must be."""
        return max(1, self._bucket_bytes // 8)

    def send(self, stream: TensorStream, engines: Sequence[Any]) -> dict[int, BaseException]:
        """Every tensor to every engine, which must have begun an update.

        Args:
          stream: made with `bucket_bytes=stream_bytes`.
          engines: Ray handles with a method `receive([(name, first byte)], [reference to a list of uint8 arrays])`.

        Returns:
          The engines, by their place in `engines`, that did not take everything, and why. The others have it all.
        """
        import ray

        lost: dict[int, BaseException] = {}
        sent: collections.deque[dict[int, Any]] = collections.deque()
        self.times = times = SendTimes()
        start = time.perf_counter()
        for bucket in stream.buckets():
            made = time.perf_counter()
            times.make += made - start
            while len(sent) >= AHEAD:
                self._settle(sent.popleft(), lost)
            waited = time.perf_counter()
            places = [(piece.name, piece.start) for piece in bucket]
            reference = ray.put([piece.data for piece in bucket])
            del bucket
            sent.append(
                {
                    index: engine.receive.remote(places, [reference])
                    for index, engine in enumerate(engines)
                    if index not in lost
                }
            )
            del reference
            start = time.perf_counter()
            times.put += start - waited
        while sent:
            self._settle(sent.popleft(), lost)
        return lost

    def _settle(self, calls: dict[int, Any], lost: dict[int, BaseException]) -> None:
        """Waits until every engine has taken a bucket or is lost; the store may then forget it."""
        deadline = time.monotonic() + self._timeout
        for index, acknowledgement in calls.items():
            if index in lost:
                continue
            if error := failure_of(acknowledgement, deadline, self._check):
                lost[index] = error


def failure_of(
    reference: Any, deadline: float, check: Callable[[], None] = lambda: None
) -> BaseException | None:
    """Waits for a Ray call; what went wrong, or None.

    Args:
      reference: what `.remote()` gave.
      deadline: of `time.monotonic`.
      check: called about twice a second; what it raises is not caught.
    """
    import ray

    while True:
        check()
        left = deadline - time.monotonic()
        try:
            ray.get(reference, timeout=min(max(0.0, left), POLL_SECONDS))
            return None
        except ray.exceptions.GetTimeoutError as error:
            if left <= POLL_SECONDS:
                return error
        except Exception as error:  # the engine's own, its process's, its machine's
            return error
