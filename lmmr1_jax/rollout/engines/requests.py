"""What a fleet keeps account of: requests that belong together, each on its way, and the engines that have them."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from lmmr1_jax.rollout.engines.protocol import EngineInfo, GroupRequest, SampledCompletion
from lmmr1_jax.runtime.errors import SamplingFailed

MOST_ATTEMPTS = 4
"""Engines that may fail over one request before the request is to blame."""
SHARED_ATTEMPTS = 2
"""After so many failures a request gets an engine for itself: the next failure is nobody else's."""


class SampleHandle:
    """Requests that belong together, and what has come of them; made by `Fleet.submit`."""

    def __init__(self, requests: int):
        self.groups: list[list[SampledCompletion] | None] = [None] * requests
        self.missing = requests
        self.failure: SamplingFailed | None = None

    @property
    def came(self) -> int:
        """Groups that are there."""
        return len(self.groups) - self.missing


@dataclasses.dataclass(eq=False)
class Work:
    """One request on its way.

    Attributes:
      request: what is asked for.
      handle, index: where the answer goes.
      failures: engines that failed while they had it.
      sent_at: when an engine got it last, by the monotonic clock.
    """

    request: GroupRequest
    handle: SampleHandle
    index: int
    failures: int = 0
    sent_at: float = 0.0

    @property
    def isolated(self) -> bool:
        """Whether it gets an engine for itself, because it may be what the engines fail over."""
        return self.failures >= SHARED_ATTEMPTS


@dataclasses.dataclass(eq=False)
class EngineRecord:
    """One engine of a slot, which may have had others before. It goes from built (`info`) to loaded (`version`), and at
    any time to lost.

    Attributes:
      slot: its number in the fleet.
      handle: Ray's handle of the actor.
      failures: engines of this slot, in a row, that were lost before they finished a group.
      previous_error: what the one before it was lost over.
      info: where it runs, once it is built and the transport knows it.
      version: of the weights that it has.
      lost: whether it is given up; its process is killed.
      work: what it is sampling, by Ray's reference of the call.
      started_at: when it was made, by the monotonic clock.
      reported_missing: whether it was logged that it does not come.
    """

    slot: int
    handle: Any
    failures: int
    previous_error: str = ""
    info: EngineInfo | None = None
    version: int | None = None
    lost: bool = False
    work: dict[Any, Work] = dataclasses.field(default_factory=dict)
    started_at: float = dataclasses.field(default_factory=time.monotonic)
    reported_missing: bool = False

    @property
    def busy(self) -> int:
        """Completions that it has been asked for."""
        return sum(work.request.completions for work in self.work.values())

    @property
    def built(self) -> bool:
        """Whether it is there, with weights or without."""
        return self.info is not None and not self.lost

    @property
    def loaded(self) -> bool:
        """Whether it may be asked for completions."""
        return self.version is not None and not self.lost

    def takes(self, work: Work, limit: int) -> bool:
        """Whether it has room for `work`."""
        if not self.loaded or any(other.isolated for other in self.work.values()):
            return False
        return not self.work if work.isolated else self.busy < limit
