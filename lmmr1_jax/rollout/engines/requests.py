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
    """One request on its way."""

    request: GroupRequest
    handle: SampleHandle
    index: int
    failures: int = 0
    since: float = 0.0

    @property
    def suspect(self) -> bool:
        """Whether it may be what the engines fail over."""
        return self.failures >= SHARED_ATTEMPTS


@dataclasses.dataclass(eq=False)
class Engine:
    """One incarnation of the engine at a place. It goes from built (`info`) to loaded (`version`), at any time to
    lost."""

    place: int
    handle: Any
    failures: int
    before: str = ""
    """What its predecessor failed with."""
    info: EngineInfo | None = None
    version: int | None = None
    lost: bool = False
    work: dict[Any, Work] = dataclasses.field(default_factory=dict)
    since: float = dataclasses.field(default_factory=time.monotonic)
    missed: bool = False
    """Whether it was said that it does not come."""

    @property
    def busy(self) -> int:
        """Completions that it has been asked for."""
        return sum(work.request.completions for work in self.work.values())

    @property
    def loaded(self) -> bool:
        """Whether it may be asked for completions."""
        return self.version is not None and not self.lost

    def takes(self, work: Work, limit: int) -> bool:
        """Whether it has room for `work`."""
        if not self.loaded or any(other.suspect for other in self.work.values()):
            return False
        return not self.work if work.suspect else self.busy < limit
