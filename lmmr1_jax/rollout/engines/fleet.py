"""Engines on the machines of a Ray cluster: work goes out as they get free, comes back once, and survives them.

    fleet = Fleet(settings, make_engine, HostTransport(), init_info)
    fleet.load(stream, version)             # every engine has these weights, or is replaced
    handle = fleet.submit(requests)         # returns at once
    groups = fleet.collect(handle)          # in the order of the requests

An engine that dies, hangs or breaks a sync is replaced, and its requests go to the others. It samples nothing before
it has whole weights: a new one gets them in the next `load` or `collect`, whichever comes first. One that can't be
built as it was told is given up at once, for the next would fail alike.

All methods run in the caller's thread, because the weights may only be read between two updates of the learner; what
an engine answers meanwhile is taken in by the thread of `dispatcher`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from lmmr1_jax.rollout.engines.dispatcher import Dispatcher, FleetSettings, kill
from lmmr1_jax.rollout.engines.protocol import EngineInfo, GroupRequest, RequestRefused, SampledCompletion
from lmmr1_jax.rollout.engines.ray_errors import cause_of, reason_for
from lmmr1_jax.rollout.engines.requests import EngineRecord, SampleHandle
from lmmr1_jax.runtime.errors import SamplingFailed
from weights_bridge.transports.host import failure_of

_log = logging.getLogger(__name__)

CLOSE_SECONDS = 2.0
"""For engines to put away their files before their processes end."""
_POLL_SECONDS = 0.5


class Fleet:
    """See the module.

    Attributes:
      dispatcher: the engines and the requests that wait for them.
      transport: how weights travel.
    """

    def __init__(
        self,
        settings: FleetSettings,
        make_engine: Callable[[int, int], Any],
        transport: Any,
        init_info: dict[str, Any],
        log: Callable[[str], None] = _log.warning,
        check: Callable[[], None] = lambda: None,
    ):
        """Starts the engines; returns at once.

        Args:
          settings: bounds.
          make_engine: a Ray handle of a new engine, from its slot and how many were made there before.
          transport: how weights travel.
          init_info: what the transport's receiving end must know before the first update.
          log: told, in one line, of engines that are lost.
          check: called again and again while something is waited for; what it raises ends the waiting, and the fleet
            must then be closed.
        """
        self.transport = transport
        given = None if transport.owns_init else init_info
        self.dispatcher = Dispatcher(settings, make_engine, given, log)
        self._lock = self.dispatcher.lock
        self._check = check
        self._stream: Any = None
        self._version: int | None = None

    @property
    def replaced(self) -> int:
        """Engines that were lost and replaced so far."""
        return self.dispatcher.replaced

    @property
    def built(self) -> list[EngineInfo]:
        """Of the engines that are there, with weights or without."""
        with self._lock:
            return [engine.info for engine in self.dispatcher.built_locked()]

    @property
    def infos(self) -> list[EngineInfo]:
        """Of the engines that have weights."""
        with self._lock:
            return [engine.info for engine in self._loaded_locked()]

    def load(self, stream: Any, version: int, *, in_flight: bool = False) -> None:
        """Gives every engine the stream's weights; waits until at least one has them.

        Args:
          stream: a TensorStream; kept for engines that come later, until `release_params`.
          version: how many updates the weights have seen.
          in_flight: change them in the midst of completions, see `Engine.begin_update`.

        Raises:
          ValueError: engines have weights of that version, and would keep them and what they cached under it.
          SamplingFailed: no engine could be started or synced in time.
        """
        with self._lock:
            if version == self._version:
                raise ValueError(f"version {version} of the weights is loaded already; others need another number")
            self._stream, self._version = stream, version
        self._sync(in_flight=in_flight)
        self._wait_until(lambda: any(engine.version == version for engine in self._loaded_locked()))

    def release_params(self) -> None:
        """The weights are about to change in place: engines that come now wait for the next `load`."""
        with self._lock:
            self._stream = None

    def submit(self, requests: Sequence[GroupRequest]) -> SampleHandle:
        """Hands the requests out as engines get free. Names must be unique among all requests on their way."""
        return self.dispatcher.submit(requests)

    def collect(
        self, handle: SampleHandle, progress: Callable[[int, int], None] = lambda done, of: None
    ) -> list[list[SampledCompletion]]:
        """Waits for a handle's groups; gives weights to engines that came since.

        Args:
          handle: of `submit`.
          progress: called with the number of groups that are there, and of all, when some have come.

        Raises:
          SamplingFailed: a request can't be served, or no engine is left to serve it.
        """
        seen, wanted = 0, len(handle.groups)
        while True:
            self._wait_until(
                lambda seen=seen: handle.came > seen or handle.came == wanted or handle.failure is not None
            )
            if handle.failure is not None:
                raise handle.failure
            seen = handle.came
            progress(seen, wanted)
            if seen == wanted:
                return handle.groups

    def probe(self, request: GroupRequest) -> list[list[SampledCompletion]]:
        """The request's group from every engine that has weights, before all that waits there.

        Raises:
          SamplingFailed: the request can't be served, or no engine is left to serve it.
        """

        def ask(engine: EngineRecord) -> Any:
            return engine.handle.generate.remote(dataclasses.replace(request, name=f"{request.name}@{engine.slot}"))

        while True:
            self._wait_until(lambda: bool(self._loaded_locked()))
            with self._lock:
                engines = self._loaded_locked()
            if answered := self._ask_each(engines, ask, self.dispatcher.settings.request_timeout):
                return [_value(call) for _, call in answered]

    def sleep(self) -> None:
        """All engines that have nothing to do give their memory back, and their weights with it, until they get the
        next ones."""
        with self._lock:
            engines = [engine for engine in self._loaded_locked() if not engine.work]
        seconds = self.dispatcher.settings.sync_timeout
        asleep = self._ask_each(engines, lambda engine: engine.handle.sleep.remote(), seconds)
        with self._lock:
            for engine, _ in asleep:
                engine.version = None

    def close(self) -> None:
        """Ends all engines."""
        self.dispatcher.stop()
        with self._lock:
            engines, built = self.dispatcher.engines, self.dispatcher.built_locked()
        deadline = time.monotonic() + CLOSE_SECONDS
        with contextlib.suppress(Exception):  # what does not answer ends without a word
            for call in [engine.handle.close.remote() for engine in built]:
                failure_of(call, deadline)
        for engine in engines:
            kill(engine.handle)

    def _wait_until(self, reached: Callable[[], bool]) -> None:
        """Waits until `reached`, which is called with the lock held; meanwhile syncs engines that were built since."""
        while True:
            self._check()
            with self._lock:
                if (broken := self.dispatcher.broken) is not None:
                    raise SamplingFailed(f"the fleet of vLLM engines failed: {reason_for(broken)}") from broken
                if reached():
                    return
                if (fault := self.dispatcher.failure_reason_locked()) is not None:
                    raise SamplingFailed(fault)
                if not self._unsynced_locked():
                    self._lock.wait(_POLL_SECONDS)
                    continue
            self._sync(in_flight=True)

    def _loaded_locked(self) -> list[EngineRecord]:
        return [engine for engine in self.dispatcher.engines if engine.loaded]

    def _unsynced_locked(self) -> list[EngineRecord]:
        if self._stream is None:
            return []
        return [engine for engine in self.dispatcher.built_locked() if engine.version != self._version]

    def _sync(self, *, in_flight: bool) -> None:
        with self._lock:
            engines, version, stream = self._unsynced_locked(), self._version, self._stream
            # What is being sampled may take that long to end, and an update between completions waits for it.
            drains = not in_flight and any(engine.work for engine in engines)
            drained = self.dispatcher.settings.request_timeout if drains else 0.0
        sync_timeout = self.dispatcher.settings.sync_timeout
        seconds = max(sync_timeout, drained)
        answered = self._ask_each(engines, lambda engine: engine.handle.begin_update.remote(in_flight), seconds)
        begun = [engine for engine, _ in answered]
        if not begun:
            return
        lost = self.transport.send(stream, [engine.handle for engine in begun])
        for index, error in lost.items():
            self.dispatcher.lose(begun[index], error)
        whole = [engine for index, engine in enumerate(begun) if index not in lost]
        done = self._ask_each(whole, lambda engine: engine.handle.finish_update.remote(version), sync_timeout)
        with self._lock:
            for engine, _ in done:
                engine.version = version
            self.dispatcher.schedule_locked()

    def _ask_each(
        self, engines: Sequence[EngineRecord], call: Callable[[EngineRecord], Any], seconds: float
    ) -> list[tuple[EngineRecord, Any]]:
        """Asks all at once; returns those that answered in time, each with its call. The others are replaced.

        Raises:
          SamplingFailed: what was asked for can't be had from any engine.
        """
        calls = [(engine, call(engine)) for engine in engines]
        deadline = time.monotonic() + seconds
        answered = []
        for engine, reference in calls:
            error = failure_of(reference, deadline, self._check)
            if error is None:
                answered.append((engine, reference))
            elif refused := cause_of(error, RequestRefused):
                raise SamplingFailed(str(refused))
            else:
                self.dispatcher.lose(engine, error)
        return answered


def _value(call: Any) -> Any:
    import ray

    return ray.get(call)
