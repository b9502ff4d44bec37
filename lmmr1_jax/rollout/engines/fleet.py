"""Engines on the machines of a Ray cluster: work goes out as they get free, comes back once, and survives them.

    fleet = Fleet(settings, make_engine, HostTransport(), init_info)
    fleet.load(stream, version)             # every engine has these weights, or is replaced
    handle = fleet.submit(requests)         # returns at once
    groups = fleet.collect(handle)          # in the order of the requests

An engine that dies, hangs or breaks a sync is replaced, and its requests go to the others. It samples nothing before
it has whole weights: a new one gets them in the next `load` or `collect`, whichever comes first. One that can't be
built as it was told is given up at once, for the next would fail alike.

A thread hears of everything that happens on the cluster; `load` and `collect` run in the caller's, because the
weights may only be read between two updates of the learner.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from lmmr1_jax.rollout.engines.protocol import (
    EngineConfigError,
    EngineFailed,
    EngineInfo,
    GroupRequest,
    RequestRefused,
    SampledCompletion,
)
from lmmr1_jax.rollout.engines.ray_errors import cause_of, reason_for
from lmmr1_jax.rollout.engines.requests import MOST_ATTEMPTS, Engine, SampleHandle, Work
from lmmr1_jax.runtime.errors import SamplingFailed
from weights_bridge.transports.host import failure_of

_log = logging.getLogger(__name__)

CLOSE_SECONDS = 2.0
"""For engines to put away their files before their processes end."""
TICK_SECONDS = 1.0
_POLL_SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class FleetSettings:
    """Bounds.

    Attributes:
      engines: places.
      max_num_seqs: completions that an engine samples at a time.
      start_timeout: seconds without any engine after which the fleet gives up.
      sync_timeout: seconds for one step of a sync.
      request_timeout: seconds for a group.
      restarts: replacements in a row at one place, none of which finished a group.
    """

    engines: int
    max_num_seqs: int
    start_timeout: float
    sync_timeout: float
    request_timeout: float
    restarts: int


class Fleet:
    """See the module.

    Attributes:
      replaced: engines that were lost and replaced so far.
    """

    def __init__(
        self,
        settings: FleetSettings,
        make_engine: Callable[[int, int], Any],
        transport: Any,
        init_info: dict[str, Any],
        say: Callable[[str], None] = _log.warning,
        check: Callable[[], None] = lambda: None,
    ):
        """Starts the engines; returns at once.

        Args:
          settings: bounds.
          make_engine: a Ray handle of a new engine, from its place and how many were made there before.
          transport: how weights travel.
          init_info: what the transport's receiving end must know before the first update.
          say: told, in one line, of engines that are lost.
          check: called again and again while something is waited for; what it raises ends the waiting, and the fleet
            must then be closed.
        """
        self.replaced = 0
        self._settings, self._make_engine, self._say, self._check = settings, make_engine, say, check
        self._transport, self._init_info = transport, init_info
        self._lock = threading.Condition()
        self._waiting: collections.deque[Work] = collections.deque()
        self._events: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._stream: Any = None
        self._version: int | None = None
        self._given_up: dict[int, str] = {}
        self._made = collections.Counter()
        self._none_since = time.monotonic()
        self._broken: BaseException | None = None
        self._engines: list[Engine] = []
        with self._lock:
            for place in range(settings.engines):
                self._start(place, failures=0)
        self._thread = threading.Thread(target=self._listen, name="fleet", daemon=True)
        self._thread.start()

    @property
    def transport(self) -> Any:
        """How weights travel."""
        return self._transport

    @property
    def built(self) -> list[EngineInfo]:
        """Of the engines that are there, with weights or without."""
        with self._lock:
            return [engine.info for engine in self._engines if engine.info is not None and not engine.lost]

    @property
    def infos(self) -> list[EngineInfo]:
        """Of the engines that have weights."""
        with self._lock:
            return [engine.info for engine in self._engines if engine.loaded]

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
        self._until(lambda: any(engine.loaded and engine.version == version for engine in self._engines))

    def release_params(self) -> None:
        """The weights are about to change in place: engines that come now wait for the next `load`."""
        with self._lock:
            self._stream = None

    def submit(self, requests: Sequence[GroupRequest]) -> SampleHandle:
        """Hands the requests out as engines get free. Names must be unique among all requests on their way."""
        handle = SampleHandle(len(requests))
        with self._lock:
            self._waiting.extend(Work(request, handle, index) for index, request in enumerate(requests))
            self._hand_out()
        return handle

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
            self._until(lambda seen=seen: handle.came > seen or handle.came == wanted or handle.failure is not None)
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

        def ask(engine: Engine) -> Any:
            return engine.handle.generate.remote(dataclasses.replace(request, name=f"{request.name}@{engine.place}"))

        while True:
            self._until(lambda: any(engine.loaded for engine in self._engines))
            with self._lock:
                engines = [engine for engine in self._engines if engine.loaded]
            if answered := self._each(engines, ask, self._settings.request_timeout):
                return [_value(call) for _, call in answered]

    def sleep(self) -> None:
        """All engines that have nothing to do give their memory back, and their weights with it, until they get the
        next ones."""
        with self._lock:
            engines = [engine for engine in self._engines if engine.loaded and not engine.work]
        asleep = self._each(engines, lambda engine: engine.handle.sleep.remote(), self._settings.sync_timeout)
        with self._lock:
            for engine, _ in asleep:
                engine.version = None

    def close(self) -> None:
        """Ends all engines."""
        self._events.put(None)
        self._thread.join(timeout=30)
        engines = [engine for engine in self._engines if engine.info is not None and not engine.lost]
        deadline = time.monotonic() + CLOSE_SECONDS
        with contextlib.suppress(Exception):  # what does not answer ends without a word
            for call in [engine.handle.close.remote() for engine in engines]:
                failure_of(call, deadline)
        for engine in self._engines:
            _kill(engine.handle)

    # What follows is said in the caller's thread.

    def _until(self, reached: Callable[[], bool]) -> None:
        """Waits, and meanwhile syncs the engines that are built and have no weights."""
        while True:
            self._check()
            with self._lock:
                if self._broken is not None:
                    fault = f"the fleet of vLLM engines failed: {reason_for(self._broken)}"
                    raise SamplingFailed(fault) from self._broken
                if reached():
                    return
                if (fault := self._hopeless()) is not None:
                    raise SamplingFailed(fault)
                if not self._unsynced():
                    self._lock.wait(_POLL_SECONDS)
                    continue
            self._sync(in_flight=True)

    def _unsynced(self) -> list[Engine]:
        if self._stream is None:
            return []
        return [e for e in self._engines if e.info is not None and not e.lost and e.version != self._version]

    def _hopeless(self) -> str | None:
        if len(self._given_up) == self._settings.engines:
            return f"no vLLM engine is left: {'; '.join(dict.fromkeys(self._given_up.values()))}"
        if self.built:
            return None
        if time.monotonic() - self._none_since > self._settings.start_timeout:
            return f"no vLLM engine came within vllm.start_timeout, {self._settings.start_timeout:g} s"
        return None

    def _sync(self, *, in_flight: bool) -> None:
        with self._lock:
            engines, version, stream = self._unsynced(), self._version, self._stream
            # What is being sampled may take that long to end, and an update between completions waits for it.
            drains = not in_flight and any(engine.work for engine in engines)
            drained = self._settings.request_timeout if drains else 0.0
        sync_timeout = self._settings.sync_timeout
        begun = [
            engine
            for engine, _ in self._each(
                engines, lambda engine: engine.handle.begin_update.remote(in_flight), max(sync_timeout, drained)
            )
        ]
        if not begun:
            return
        lost = self._transport.send(stream, [engine.handle for engine in begun])
        for index, error in lost.items():
            self._lose(begun[index], error)
        whole = [engine for index, engine in enumerate(begun) if index not in lost]
        done = self._each(whole, lambda engine: engine.handle.finish_update.remote(version), sync_timeout)
        with self._lock:
            for engine, _ in done:
                engine.version = version
            self._hand_out()

    def _each(
        self, engines: Sequence[Engine], call: Callable[[Engine], Any], seconds: float
    ) -> list[tuple[Engine, Any]]:
        """Asks all at once; those that answered in time, each with its call. The others are lost.

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
                self._lose(engine, error)
        return answered

    # What follows is said with the lock held.

    def _start(self, place: int, failures: int, before: str = "") -> None:
        engine = Engine(place, self._make_engine(place, self._made[place]), failures, before)
        self._made[place] += 1
        self._engines = [other for other in self._engines if other.place != place] + [engine]
        self._hear(engine.handle.built.remote(), lambda result: self._built(engine, result))

    def _hand_out(self) -> None:
        """Each group whole to the engine that has least to do, while any has room."""
        while self._waiting:
            work = self._waiting[0]
            free = [engine for engine in self._engines if engine.takes(work, self._settings.max_num_seqs)]
            if not free:
                return
            engine = min(free, key=lambda engine: engine.busy)
            self._waiting.popleft()
            work.since = time.monotonic()
            call = engine.handle.generate.remote(work.request)
            engine.work[call] = work
            self._hear(call, lambda result, call=call, engine=engine: self._finished(engine, call, result))

    def _finished(self, engine: Engine, call: Any, result: Any) -> None:
        work = engine.work.pop(call, None)
        if work is None:  # lost before; somebody else does it now
            return
        if isinstance(result, BaseException):
            if refused := cause_of(result, RequestRefused):
                self._fail(work.handle, str(refused))
            else:
                engine.work[call] = work
                self._replace(engine, result)
        elif work.handle.groups[work.index] is None:
            engine.failures = 0
            work.handle.groups[work.index] = result
            work.handle.missing -= 1
        self._hand_out()

    def _built(self, engine: Engine, result: Any) -> None:
        if isinstance(result, BaseException):
            self._replace(engine, result)
            return
        if self._transport.owns_init:
            engine.info = result
            return

        def initialised(answer: Any) -> None:
            if isinstance(answer, BaseException):
                self._replace(engine, answer)
            else:
                engine.info = result

        self._hear(engine.handle.initialise.remote(self._init_info), initialised)

    def _replace(self, engine: Engine, error: BaseException) -> None:
        """The engine is gone: its work goes to the front of the queue, a new one to its place."""
        if engine.lost:
            return
        engine.lost, engine.version = True, None
        _kill(engine.handle)
        reason = reason_for(error)
        for work in reversed(engine.work.values()):
            work.failures += 1
            self._waiting.appendleft(work)
            if work.failures >= MOST_ATTEMPTS:
                self._fail(
                    work.handle,
                    f"{work.failures} vLLM engines failed while they sampled from {work.request.name}: {reason}",
                )
        engine.work.clear()
        if engine.info is not None and not self.built:
            self._none_since = time.monotonic()
        where = "" if engine.info is None else f" on {engine.info.host}"
        # What two say in the same words before they are built, the next would say too.
        again = engine.info is None and reason == engine.before and cause_of(error, EngineFailed)
        if cause_of(error, EngineConfigError) or again or engine.failures >= self._settings.restarts:
            self._given_up[engine.place] = reason
            if len(self._given_up) < self._settings.engines:  # else it is what `_hopeless` says
                self._say(f"vLLM engine {engine.place}{where} is given up: {reason}")
        else:
            self.replaced += 1
            self._say(f"vLLM engine {engine.place}{where} is replaced: {reason}")
            self._start(engine.place, engine.failures + 1, reason)
        self._hand_out()

    def _fail(self, handle: SampleHandle, fault: str) -> None:
        """The handle can't be served; nobody need try."""
        handle.failure = handle.failure or SamplingFailed(fault)
        self._waiting = collections.deque(work for work in self._waiting if work.handle is not handle)

    # What follows is said by whoever hears of it.

    def _lose(self, engine: Engine, error: BaseException) -> None:
        with self._lock:
            try:
                self._replace(engine, error)
            except Exception as fault:  # as in `_listen`: the next to wait hears of it
                self._broken = fault
            self._lock.notify_all()

    def _hear(self, call: Any, then: Callable[[Any], Any]) -> None:
        """`then(result or exception)`, in the thread, with the lock held."""

        def told(future: Any) -> None:
            error = future.exception()
            self._events.put(lambda: then(error if error is not None else future.result()))

        call.future().add_done_callback(told)

    def _listen(self) -> None:
        looked = time.monotonic()
        while True:
            try:
                event = self._events.get(timeout=TICK_SECONDS)
            except queue.Empty:
                event = _nothing
            if event is None:
                return
            with self._lock:
                try:
                    event()
                    if time.monotonic() - looked >= TICK_SECONDS:
                        looked = time.monotonic()
                        self._look_for_hanging(looked - self._settings.request_timeout)
                        self._look_for_missing(looked - self._settings.start_timeout)
                except Exception as error:  # Ray's own, of a cluster that is gone; whoever waits must hear of it
                    self._broken = error
                self._lock.notify_all()

    def _look_for_hanging(self, oldest: float) -> None:
        for engine in list(self._engines):
            if not engine.lost and any(work.since < oldest for work in engine.work.values()):
                seconds = self._settings.request_timeout
                self._replace(engine, TimeoutError(f"a group took longer than vllm.request_timeout, {seconds:g} s"))

    def _look_for_missing(self, oldest: float) -> None:
        """An engine may wait for a machine that comes back, or be held up for ever: nobody can tell, but all can know
        that the run goes on with fewer. (Where there is none at all, `_hopeless` says so.)"""
        for engine in self._engines if self.built else ():
            if engine.info is None and not engine.lost and not engine.missed and engine.since < oldest:
                engine.missed = True
                seconds = self._settings.start_timeout
                self._say(f"vLLM engine {engine.place} has not come within vllm.start_timeout, {seconds:g} s")


def _nothing() -> None:
    """No event."""


def _kill(handle: Any) -> None:
    import ray

    with contextlib.suppress(Exception):  # it may be dead, or the cluster gone
        ray.kill(handle)


def _value(call: Any) -> Any:
    import ray

    return ray.get(call)
