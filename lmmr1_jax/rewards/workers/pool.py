"""Workers that can be killed: a pool of processes that answer tasks, each within a time limit of its own.

    with WorkerPool("lmmr1_jax.rewards.rules.worker_job", workers=2, timeout=5.0) as pool:
        answers = pool.run(tasks)

What a model wrote may hang a parser, eat the machine's memory or kill the interpreter, and so may a reward function
that somebody wrote. A task whose worker hangs or dies has a `WorkerFailure` for an answer, and no other task's answer
changes: answers arrive one by one, and what a killed worker had still to do goes to another.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

LARGEST_CHUNK = 16
"""Tasks sent to a worker at a time: enough that it need not wait for the next, few enough to share evenly."""

MOST_FAILED_STARTS = 5
FORK_SERVER = "lmmr1_jax.rewards.workers.fork_server"


@dataclasses.dataclass(frozen=True)
class WorkerFailure:
    """Why there is no answer.

    Attributes:
      kind: "timeout", "died" or "error".
      detail: what the worker said of an error.
    """

    kind: str
    detail: str = ""


class StartFailed(RuntimeError):
    """The workers do not start; the message says why as far as it is known."""


class WorkerPool:
    """Processes that live as long as the pool. Calls from several threads take turns.

    Attributes:
      timeout: seconds that a task may take.
    """

    def __init__(
        self,
        job: str,
        *arguments: str,
        workers: int,
        timeout: float,
        memory_bytes: int = 0,
        start_timeout: float = float("inf"),
    ):
        """Starts the workers and returns at once; they import what they need meanwhile.

        Args:
          job: module of the work (`fork_server.py` says what it defines), with its arguments.
          workers: processes, up to 256.
          memory_bytes: address space of one worker; 0 is no limit.
          start_timeout: seconds that a worker may take to be ready.
        """
        self.timeout = timeout
        self._job = (job, *arguments)
        self._memory_bytes, self._start_timeout = memory_bytes, start_timeout
        self._turn = threading.Lock()
        self._fork_server: _ForkServer | None = None
        self._workers = [_Worker(slot) for slot in range(min(max(1, workers), 256))]
        self._closed = False
        with self._turn:
            for worker in self._workers:
                self._start(worker)

    def run(
        self, tasks: Sequence[Any], on_answer: Callable[[int], None] = lambda index: None
    ) -> list[Any | WorkerFailure]:
        """The answer to every task, in order, or the fault that kept it from being answered.

        Args:
          tasks: what the job answers.
          on_answer: called with a task's index when its answer has come.

        Raises:
          StartFailed: no worker could be started.
          RuntimeError: the pool is closed, or was while it worked.
        """
        answers: list[Any] = [None] * len(tasks)

        def settle(index: int, answer: Any) -> None:
            answers[index] = answer
            on_answer(index)

        self._take_turn(collections.deque(enumerate(tasks)), settle)
        return answers

    def serve(self, inbox: Inbox) -> None:
        """Answers what other threads put into `inbox`, until it is closed; raises what `run` raises."""
        try:
            self._take_turn(collections.deque(), Inbox.settle, inbox)
        except BaseException as error:
            inbox.fail(error)
            raise

    def pids(self) -> list[int]:
        """Process ids of the workers that are up."""
        return [worker.pid for worker in self._workers if worker.pid is not None]

    def close(self) -> None:
        """Ends all workers, busy or not; a call that waits for them in another thread raises RuntimeError."""
        self._closed = True
        if self._fork_server is not None:
            self._fork_server.close()  # before our turn: whoever has it may be waiting for a worker that hangs
        with self._turn:
            for worker in self._workers:
                worker.hang_up()
            if self._fork_server is not None:
                self._fork_server.close()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take_turn(
        self, queue: collections.deque[_Ticketed], settle: Callable[[Any, Any], None], inbox: Inbox | None = None
    ) -> None:
        if self._closed:
            raise RuntimeError("the verifier is closed")
        with self._turn:
            try:
                self._work(queue, settle, inbox)
            except BaseException:
                for worker in self._workers:  # answers to these tasks must not be taken for answers to the next
                    if worker.assigned and not self._closed:
                        worker.assigned.clear()
                        self._start(worker)
                raise

    def _work(
        self, queue: collections.deque[_Ticketed], settle: Callable[[Any, Any], None], inbox: Inbox | None
    ) -> None:
        """Deals the queue's tasks and settles their tickets, until there are none and none can come."""
        failed_starts = 0

        def fail(worker: _Worker, fault: WorkerFailure) -> None:
            """The task in hand gets its fault, those behind it go back to the head of the queue."""
            ticket, _ = worker.assigned.popleft()
            queue.extendleft(reversed(worker.assigned))
            worker.assigned.clear()
            self._start(worker)
            settle(ticket, fault)

        while queue or any(worker.assigned for worker in self._workers) or (inbox is not None and inbox.is_open):
            for worker in self._workers:
                if worker.pid is None or worker.assigned or not queue:
                    continue
                size = max(1, min(LARGEST_CHUNK, len(queue) // (2 * len(self._workers))))
                worker.assigned.extend(queue.popleft() for _ in range(min(size, len(queue))))
                try:
                    worker.connection.send([task for _, task in worker.assigned])
                    worker.since = time.monotonic()
                except OSError:  # it had died while idle: nobody's fault
                    queue.extendleft(reversed(worker.assigned))
                    worker.assigned.clear()
                    self._start(worker)
            connections = {worker.connection: worker for worker in self._workers}
            waited_for = [*connections, inbox] if inbox is not None and inbox.is_open else [*connections]
            spoke = wait(waited_for, timeout=self._patience())
            if inbox in spoke:
                queue.extend(inbox.take())
            for worker in filter(None, map(connections.get, spoke)):
                try:
                    while True:
                        message = worker.connection.recv()
                        worker.since = time.monotonic()
                        if worker.pid is None:
                            if isinstance(message, str):
                                raise StartFailed(message)
                            if message:
                                worker.pid, failed_starts = message, 0
                        else:
                            known, value = message
                            settle(worker.assigned.popleft()[0], value if known else WorkerFailure("error", value))
                        if not worker.connection.poll():
                            break
                except (EOFError, OSError):
                    if worker.assigned:
                        fail(worker, WorkerFailure("died"))
                        continue
                    failed_starts += worker.pid is None
                    if failed_starts >= MOST_FAILED_STARTS:
                        raise StartFailed("the workers do not start; what they say is on stderr above") from None
                    self._start(worker)
            now = time.monotonic()
            for worker in self._workers:
                # Whoever spoke has been given a new start above; whoever has an answer waiting is not late either.
                if worker.connection.poll():
                    continue
                if worker.assigned and now - worker.since > self.timeout:
                    fail(worker, WorkerFailure("timeout"))
                elif worker.pid is None and now - worker.since > self._start_timeout:
                    raise StartFailed(f"not ready within {self._start_timeout:g} s")

    def _patience(self) -> float | None:
        """Seconds until the first worker is late."""
        now = time.monotonic()
        limits = [worker.since + self.timeout - now for worker in self._workers if worker.assigned]
        limits += [worker.since + self._start_timeout - now for worker in self._workers if worker.pid is None]
        first = min(limits, default=float("inf"))
        return None if first == float("inf") else max(0.0, first)

    def _start(self, worker: _Worker) -> None:
        """Start the worker in its slot, killing the one that was there."""
        for _ in range(2):
            if self._closed:
                raise RuntimeError("the verifier was closed while it worked")
            if self._fork_server is None:
                self._fork_server = _ForkServer(self._memory_bytes, self._job)
            worker.hang_up()
            ours, theirs = socket.socketpair()
            worker.connection = Connection(ours.detach())
            worker.since = float("inf")  # the fork server may be starting itself
            with theirs:
                try:
                    socket.send_fds(self._fork_server.control, [bytes([worker.slot])], [theirs.fileno()])
                    return
                except OSError:  # somebody killed the fork server, and with it all workers
                    self._fork_server.close()
                    self._fork_server = None
        raise StartFailed("the workers do not start; what they say is on stderr above")


_Ticketed = tuple[Any, Any]
"""A task behind the ticket that its answer goes to."""


class Inbox:
    """Tasks that come from other threads while the pool works (`WorkerPool.serve`).

    Attributes:
      is_open: whether tasks can still come.
    """

    def __init__(self) -> None:
        self.is_open = True
        self._lock = threading.Lock()
        self._new: list[_Ticketed] = []
        self._unsettled: set[Future] = set()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_writer.setblocking(False)

    def submit(self, task: Any) -> Future:
        """The task's answer or `WorkerFailure`, when it is known; raises RuntimeError once the inbox is closed."""
        future: Future = Future()
        with self._lock:
            if not self.is_open:
                raise RuntimeError("the verifier is closed")
            self._new.append((future, task))
            self._unsettled.add(future)
        future.add_done_callback(self._unsettled.discard)
        self._wake()
        return future

    def take(self) -> list[_Ticketed]:
        """What has come since the last time."""
        with self._lock:
            with contextlib.suppress(BlockingIOError):
                self._wake_reader.recv(4096, socket.MSG_DONTWAIT)
            new, self._new = self._new, []
        return new

    def close(self) -> None:
        """No task comes any more; those that have come are still answered."""
        with self._lock:
            self.is_open = False
        self._wake()

    def fail(self, error: BaseException) -> None:
        """Nobody answers any more."""
        self.close()
        for future in list(self._unsettled):
            with contextlib.suppress(InvalidStateError):  # it was settled meanwhile
                future.set_exception(RuntimeError(str(error)))

    @staticmethod
    def settle(future: Future, answer: Any) -> None:
        """Hands an answer to whoever waits for it."""
        with contextlib.suppress(InvalidStateError):  # nobody waits any more
            future.set_result(answer)

    def fileno(self) -> int:
        return self._wake_reader.fileno()

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full: the pool has yet to read what is in it
            self._wake_writer.send(b".")


class _Worker:
    """Our end of a worker: `pid` is None until it has said that it is up, `assigned` are the tasks it works on,
    `since` is when it last said something."""

    def __init__(self, slot: int):
        self.slot = slot
        self.pid: int | None = None
        self.connection: Connection | None = None
        self.assigned: collections.deque[_Ticketed] = collections.deque()
        self.since = 0.0

    def hang_up(self) -> None:
        if self.connection is not None:
            self.connection.close()
        self.connection, self.pid = None, None


class _ForkServer:
    """The process that workers are forked from (`fork_server.py`); it ends when our end of its socket closes."""

    def __init__(self, memory_bytes: int, job: Sequence[str]):
        root = str(Path(__file__).parents[3])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        # A fixed hash seed: sympy orders some sets by hash, and a resumed run must judge as the first one did.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONHASHSEED": "0"}
        self.control, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", FORK_SERVER, str(theirs.fileno()), str(memory_bytes), *job],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=environment,
            )
        self.close = weakref.finalize(self, _end, self.control, process)  # also when the interpreter exits


def _end(control: socket.socket, process: subprocess.Popen) -> None:
    control.close()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)
