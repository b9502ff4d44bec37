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

import numpy as np

from weights_bridge.stream import TensorStream
from weights_bridge.vllm.plugin import HOST_BACKEND

POLL_SECONDS = 0.5


@dataclasses.dataclass
class _Sent:
    """A bucket on its way: its size, and the acknowledgements that are still out, by engine."""

    nbytes: int
    acknowledgements: dict[int, Any]


class HostTransport:
    """Sends a stream of tensors into engines.

    The learner's host holds less than two buckets beside the parameters, a bucket being the setting or the largest
    tensor, whichever is larger. Buckets are therefore made half as large as the setting: one is being made while
    another is read.

    Attributes:
      name: for the log.
      backend: the weight-transfer engine that vLLM must be told to use.
      introduces_itself: whether `send` initialises the engines; here their owner does, once.
    """

    name = "host"
    backend = HOST_BACKEND
    introduces_itself = False

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

    @property
    def stream_bytes(self) -> int:
        """What a stream's `bucket_bytes` must be."""
        return max(1, self._bucket_bytes // 2)

    def send(self, stream: TensorStream, engines: Sequence[Any]) -> dict[int, BaseException]:
        """Every tensor to every engine, which must have begun an update.

        Args:
          stream: made with `bucket_bytes=stream_bytes`.
          engines: Ray handles with a method `receive(names, [reference])`.

        Returns:
          The engines, by their place in `engines`, that did not take everything, and why. The others have it all.
        """
        import ray

        limit = 2 * max(self._bucket_bytes, max(spec.nbytes for spec in stream.specs))
        lost: dict[int, BaseException] = {}
        sent: collections.deque[_Sent] = collections.deque()
        for bucket in stream.buckets():
            names = [name for name, _ in bucket]
            # As bytes: the other side may not know NumPy's bfloat16.
            arrays = [np.ascontiguousarray(array).reshape(-1).view(np.uint8) for _, array in bucket]
            nbytes = sum(array.nbytes for array in arrays)
            while sent and sum(other.nbytes for other in sent) + 2 * nbytes > limit:
                self._settle(sent.popleft(), lost)
            reference = ray.put(arrays)
            del bucket, arrays
            sent.append(
                _Sent(
                    nbytes,
                    {
                        index: engine.receive.remote(names, [reference])
                        for index, engine in enumerate(engines)
                        if index not in lost
                    },
                )
            )
            del reference
        while sent:
            self._settle(sent.popleft(), lost)
        return lost

    def _settle(self, sent: _Sent, lost: dict[int, BaseException]) -> None:
        """Waits until every engine has taken the bucket or is lost; the store may then forget it."""
        deadline = time.monotonic() + self._timeout
        for index, acknowledgement in sent.acknowledgements.items():
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
