"""The fleet's accounts: which engines there are, which requests wait for them, and what becomes of both.

Locking: one lock, `Dispatcher.lock`, guards everything here. A method whose name ends in `_locked` must be called with
the lock held; every other one takes it. Two kinds of threads come here: the caller's of `Fleet`, and the event loop,
a thread named "fleet", which runs what follows the end of a call to an engine. Ray's own threads only put events on
the loop's queue. Whoever changes something that a caller may wait for notifies the lock, which is a condition.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from lmmr1_jax.rollout.engines.protocol import EngineConfigError, EngineFailed, GroupRequest, RequestRefused
from lmmr1_jax.rollout.engines.ray_errors import cause_of, reason_for
from lmmr1_jax.rollout.engines.requests import MOST_ATTEMPTS, EngineRecord, SampleHandle, Work
from lmmr1_jax.runtime.errors import SamplingFailed

TICK_SECONDS = 1.0
"""How often the event loop looks for engines that hang or do not come."""


@dataclasses.dataclass(frozen=True)
class FleetSettings:
    """Bounds.

    Attributes:
      engines: slots.
      max_num_seqs: completions that an engine samples at a time.
      start_timeout: seconds without any engine after which the fleet gives up.
      sync_timeout: seconds for one step of a sync.
      request_timeout: seconds for a group.
      restarts: replacements in a row at one slot, none of which finished a group.
    """

    engines: int
    max_num_seqs: int
    start_timeout: float
    sync_timeout: float
    request_timeout: float
    restarts: int


class Dispatcher:
    """Starts engines, replaces those that are lost, and hands requests to those that have weights.

    Attributes:
      lock: see the module.
      settings: bounds.
      engines: one per slot, the lost one of a slot that was given up included. Read with the lock held.
      broken: what the event loop failed with, if it did: Ray's own errors, of a cluster that is gone.
      replaced: engines that were lost and replaced so far.
      log: told, in one line, of engines that are lost.
    """

    def __init__(
        self,
        settings: FleetSettings,
        make_engine: Callable[[int, int], Any],
        init_info: dict[str, Any] | None,
        log: Callable[[str], None],
    ):
        """Starts the engines and the event loop; returns at once.

        Args:
          settings: bounds.
          make_engine: a Ray handle of a new engine, from its slot and how many were made there before.
          init_info: what an engine is initialised with when it is built; None where the transport does that itself.
          log: see the class.
        """
        self.lock = threading.Condition()
        self.engines: list[EngineRecord] = []
        self.broken: BaseException | None = None
        self.replaced = 0
        self.log = log
        self.settings, self._make_engine, self._init_info = settings, make_engine, init_info
        self._waiting: collections.deque[Work] = collections.deque()
        self._events: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._given_up: dict[int, str] = {}
        self._made: collections.Counter[int] = collections.Counter()
        self._none_since = time.monotonic()
        with self.lock:
            for slot in range(settings.engines):
                self._start_locked(slot, failures=0)
        self._thread = threading.Thread(target=self._event_loop, name="fleet", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[GroupRequest]) -> SampleHandle:
        """Queues the requests and hands out what engines have room for."""
        handle = SampleHandle(len(requests))
        with self.lock:
            self._waiting.extend(Work(request, handle, index) for index, request in enumerate(requests))
            self.schedule_locked()
        return handle

    def lose(self, engine: EngineRecord, error: BaseException) -> None:
        """Replaces an engine over which a call failed."""
        with self.lock:
            try:
                self._replace_locked(engine, error)
            except Exception as fault:  # as in the event loop: the next to wait hears of it
                self.broken = fault
            self.lock.notify_all()

    def stop(self) -> None:
        """Ends the event loop."""
        self._events.put(None)
        self._thread.join(timeout=30)

    def built_locked(self) -> list[EngineRecord]:
        """The engines that are there, with weights or without."""
        return [engine for engine in self.engines if engine.built]

    def failure_reason_locked(self) -> str | None:
        """Why no engine is to be expected any more, or None."""
        if len(self._given_up) == self.settings.engines:
            return f"no vLLM engine is left: {'; '.join(dict.fromkeys(self._given_up.values()))}"
        if self.built_locked():
            return None
        if time.monotonic() - self._none_since > self.settings.start_timeout:
            return f"no vLLM engine came within vllm.start_timeout, {self.settings.start_timeout:g} s"
        return None

    def schedule_locked(self) -> None:
        """Hands each waiting group whole to the engine that has least to do, while any has room."""
        while self._waiting:
            work = self._waiting[0]
            free = [engine for engine in self.engines if engine.takes(work, self.settings.max_num_seqs)]
            if not free:
                return
            engine = min(free, key=lambda engine: engine.busy)
            self._waiting.popleft()
            work.sent_at = time.monotonic()
            call = engine.handle.generate.remote(work.request)
            engine.work[call] = work
            self._on_done(call, lambda result, call=call, engine=engine: self._finished_locked(engine, call, result))

    def _start_locked(self, slot: int, failures: int, previous_error: str = "") -> None:
        engine = EngineRecord(slot, self._make_engine(slot, self._made[slot]), failures, previous_error)
        self._made[slot] += 1
        self.engines = [other for other in self.engines if other.slot != slot] + [engine]
        self._on_done(engine.handle.built.remote(), lambda result: self._built_locked(engine, result))

    def _built_locked(self, engine: EngineRecord, result: Any) -> None:
        if isinstance(result, BaseException):
            self._replace_locked(engine, result)
            return
        if self._init_info is None:
            engine.info = result
            return

        def initialised_locked(answer: Any) -> None:
            if isinstance(answer, BaseException):
                self._replace_locked(engine, answer)
            else:
                engine.info = result

        self._on_done(engine.handle.initialise.remote(self._init_info), initialised_locked)

    def _finished_locked(self, engine: EngineRecord, call: Any, result: Any) -> None:
        work = engine.work.pop(call, None)
        if work is None:  # lost before; another engine does it now
            return
        if isinstance(result, BaseException):
            if refused := cause_of(result, RequestRefused):
                self._fail_locked(work.handle, str(refused))
            else:
                engine.work[call] = work
                self._replace_locked(engine, result)
        elif work.handle.groups[work.index] is None:
            engine.failures = 0
            work.handle.groups[work.index] = result
            work.handle.missing -= 1
        self.schedule_locked()

    def _replace_locked(self, engine: EngineRecord, error: BaseException) -> None:
        """The engine is gone: its work goes to the front of the queue, a new one to its slot."""
        if engine.lost:
            return
        was_built = engine.built
        engine.lost, engine.version = True, None
        kill(engine.handle)
        reason = reason_for(error)
        for work in reversed(engine.work.values()):
            work.failures += 1
            self._waiting.appendleft(work)
            if work.failures >= MOST_ATTEMPTS:
                self._fail_locked(
                    work.handle,
                    f"{work.failures} vLLM engines failed while they sampled from {work.request.name}: {reason}",
                )
        engine.work.clear()
        if was_built and not self.built_locked():
            self._none_since = time.monotonic()
        where = f" on {engine.info.host}" if was_built else ""
        # What two say in the same words before they are built, the next would say too.
        again = not was_built and reason == engine.previous_error and cause_of(error, EngineFailed)
        if cause_of(error, EngineConfigError) or again or engine.failures >= self.settings.restarts:
            self._given_up[engine.slot] = reason
            if len(self._given_up) < self.settings.engines:  # else `failure_reason_locked` tells it
                self.log(f"vLLM engine {engine.slot}{where} is given up: {reason}")
        else:
            self.replaced += 1
            self.log(f"vLLM engine {engine.slot}{where} is replaced: {reason}")
            self._start_locked(engine.slot, engine.failures + 1, reason)
        self.schedule_locked()

    def _fail_locked(self, handle: SampleHandle, fault: str) -> None:
        """The handle can't be served; what else of it waits is dropped."""
        handle.failure = handle.failure or SamplingFailed(fault)
        self._waiting = collections.deque(work for work in self._waiting if work.handle is not handle)

    def _on_done(self, call: Any, then: Callable[[Any], Any]) -> None:
        """Lets the event loop call `then(result or exception)`, with the lock held, when a call to an engine ends."""

        def enqueue(future: Any) -> None:
            error = future.exception()
            self._events.put(lambda: then(error if error is not None else future.result()))

        call.future().add_done_callback(enqueue)

    def _event_loop(self) -> None:
        looked = time.monotonic()
        while True:
            try:
                event = self._events.get(timeout=TICK_SECONDS)
            except queue.Empty:
                event = _nothing
            if event is None:
                return
            with self.lock:
                try:
                    event()
                    if time.monotonic() - looked >= TICK_SECONDS:
                        looked = time.monotonic()
                        self._replace_hanging_locked(looked - self.settings.request_timeout)
                        self._report_missing_locked(looked - self.settings.start_timeout)
                except Exception as error:  # Ray's own, of a cluster that is gone; whoever waits must hear of it
                    self.broken = error
                self.lock.notify_all()

    def _replace_hanging_locked(self, oldest: float) -> None:
        for engine in list(self.engines):
            if not engine.lost and any(work.sent_at < oldest for work in engine.work.values()):
                seconds = self.settings.request_timeout
                error = TimeoutError(f"a group took longer than vllm.request_timeout, {seconds:g} s")
                self._replace_locked(engine, error)

    def _report_missing_locked(self, oldest: float) -> None:
        """An engine may wait for a machine that comes back, or be held up for ever. Which of them can't be known, but
        the run goes on with fewer, and that is logged. (Where there is none at all, `failure_reason_locked` tells.)"""
        for engine in self.engines if self.built_locked() else ():
            waits = engine.info is None and not engine.lost and not engine.reported_missing
            if waits and engine.started_at < oldest:
                engine.reported_missing = True
                seconds = self.settings.start_timeout
                self.log(f"vLLM engine {engine.slot} has not come within vllm.start_timeout, {seconds:g} s")


def kill(handle: Any) -> None:
    """Ends an engine's process."""
    import ray

    with contextlib.suppress(Exception):  # it may be dead, or the cluster gone
        ray.kill(handle)


def _nothing() -> None:
    """No event."""
