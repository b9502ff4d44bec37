"""Rewards, judged in processes that can be killed.

    with Verifier(config.rewards) as verifier:
        rewards = verifier.score(texts, labels)

What a model wrote may hang a parser, eat the machine's memory or kill the interpreter. Each completion is judged
within a time limit of its own; one whose judge hangs or dies earns 0 and says so in `Reward.fault`, and no other
completion's reward changes: answers arrive one by one, and what a killed worker had still to do goes to another.
"""

from __future__ import annotations

import collections
import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from lmmr1_jax.config import RewardsConfig
from lmmr1_jax.types import Reward

LARGEST_CHUNK = 16
"""Completions sent to a worker at a time: enough that it need not wait for the next, few enough to share evenly."""

MOST_FAILED_STARTS = 5

Fault = str
"""Why there is no answer: "timeout", "died" or "error"."""


class Verifier:
    """A pool of reward workers that lives as long as the run. Not for several threads at once: calls take turns.

    Attributes:
      config: variant, weights, time limit per completion in seconds, number of workers.
    """

    def __init__(self, config: RewardsConfig, *, memory_bytes: int = 2 << 30):
        """Starts the workers and returns at once; they import the rules meanwhile, which no time limit counts.

        Args:
          memory_bytes: address space of one worker.
        """
        self.config = config
        self._memory_bytes = memory_bytes
        self._turn = threading.Lock()
        self._warden: _Warden | None = None
        self._workers = [_Worker(slot) for slot in range(min(max(1, config.workers), 256))]
        self._closed = False
        with self._turn:
            for worker in self._workers:
                self._start(worker)

    def score(self, texts: Sequence[str], labels: Sequence[str], prompts: Sequence[str] | None = None) -> list[Reward]:
        """One reward per completion, in order.

        Args:
          texts: the completions as text.
          labels: the gold answer of each.
          prompts: the prompt of each as text; `lmm-r1` reads it where a completion is empty.
        """
        prompts = [""] * len(texts) if prompts is None else prompts
        tasks = [
            ("grade", (text, label, self.config.variant, prompt))
            for text, label, prompt in zip(texts, labels, prompts, strict=True)
        ]
        return [self._reward(answer) for answer in self._run(tasks)]

    def parsable(self, labels: Sequence[str]) -> list[bool]:
        """`rules.gold_is_parsable` for each, within the time limit: an answer that hangs the parser is none."""
        answers = self._run([("gold_is_parsable", (label, self.config.variant)) for label in labels])
        return [answer is True for answer in answers]

    def pids(self) -> list[int]:
        """Process ids of the workers that are up."""
        return [worker.pid for worker in self._workers if worker.pid is not None]

    def close(self) -> None:
        """Ends all workers, busy or not; a call that waits for them in another thread raises RuntimeError."""
        self._closed = True
        if self._warden is not None:
            self._warden.close()  # before our turn: whoever has it may be waiting for a worker that hangs
        with self._turn:
            for worker in self._workers:
                worker.hang_up()
            if self._warden is not None:
                self._warden.close()

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _reward(self, answer: tuple[float, float] | Fault) -> Reward:
        if isinstance(answer, str):
            return Reward(0.0, {"accuracy": 0.0, "format": 0.0}, answer)
        accuracy, form = answer
        total = self.config.accuracy_weight * accuracy + self.config.format_weight * form
        return Reward(total, {"accuracy": accuracy, "format": form})

    def _run(self, tasks: list[tuple[str, tuple]]) -> list[Any | Fault]:
        """The answer to every task, or the fault that kept it from being answered."""
        if self._closed:
            raise RuntimeError("the verifier is closed")
        with self._turn:
            try:
                return self._run_in_turn(tasks)
            except BaseException:
                for worker in self._workers:  # answers to these tasks must not be taken for answers to the next
                    if worker.assigned and not self._closed:
                        worker.assigned.clear()
                        self._start(worker)
                raise

    def _run_in_turn(self, tasks: list[tuple[str, tuple]]) -> list[Any | Fault]:
        answers: list[Any] = [None] * len(tasks)
        queue = collections.deque(range(len(tasks)))
        unanswered = len(tasks)
        failed_starts = 0

        def fail(worker: _Worker, fault: Fault) -> int:
            """The task in hand gets its fault, those behind it go back to the head of the queue."""
            index = worker.assigned.popleft()
            answers[index] = fault
            queue.extendleft(reversed(worker.assigned))
            worker.assigned.clear()
            self._start(worker)
            return 1

        while unanswered:
            for worker in self._workers:
                if worker.pid is None or worker.assigned or not queue:
                    continue
                size = max(1, min(LARGEST_CHUNK, len(queue) // (2 * len(self._workers))))
                worker.assigned.extend(queue.popleft() for _ in range(min(size, len(queue))))
                try:
                    worker.connection.send([tasks[index] for index in worker.assigned])
                    worker.since = time.monotonic()
                except OSError:  # it had died while idle: nobody's fault
                    queue.extendleft(reversed(worker.assigned))
                    worker.assigned.clear()
                    self._start(worker)
            now = time.monotonic()
            limits = [worker.since + self.config.timeout - now for worker in self._workers if worker.assigned]
            connections = {worker.connection: worker for worker in self._workers}
            spoke = wait(connections, timeout=max(0.0, min(limits)) if limits else None)
            for worker in map(connections.get, spoke):
                try:
                    while True:
                        message = worker.connection.recv()
                        worker.since = time.monotonic()
                        if worker.pid is None:
                            worker.pid, failed_starts = message, 0
                        else:
                            known, value = message
                            answers[worker.assigned.popleft()] = value if known else "error"
                            unanswered -= 1
                        if not worker.connection.poll():
                            break
                except (EOFError, OSError):
                    if worker.assigned:
                        unanswered -= fail(worker, "died")
                        continue
                    failed_starts += worker.pid is None
                    if failed_starts >= MOST_FAILED_STARTS:
                        raise RuntimeError(
                            "the verifier's workers do not start; what they say is on stderr above"
                        ) from None
                    self._start(worker)
            now = time.monotonic()
            for worker in self._workers:
                # Whoever spoke has been given a new start above; whoever has an answer waiting is not late either.
                if worker.assigned and now - worker.since > self.config.timeout and not worker.connection.poll():
                    unanswered -= fail(worker, "timeout")
        return answers

    def _start(self, worker: _Worker) -> None:
        """Start the worker in its slot, killing the one that was there."""
        for _ in range(2):
            if self._closed:
                raise RuntimeError("the verifier was closed while it worked")
            if self._warden is None:
                self._warden = _Warden(self._memory_bytes)
            worker.hang_up()
            ours, theirs = socket.socketpair()
            worker.connection = Connection(ours.detach())
            with theirs:
                try:
                    socket.send_fds(self._warden.control, [bytes([worker.slot])], [theirs.fileno()])
                    return
                except OSError:  # somebody killed the warden, and with it all workers
                    self._warden.close()
                    self._warden = None
        raise RuntimeError("the verifier's workers do not start; what they say is on stderr above")


class _Worker:
    """Our end of a worker: `pid` is None until it has said that it is up, `assigned` are the tasks it works on."""

    def __init__(self, slot: int):
        self.slot = slot
        self.pid: int | None = None
        self.connection: Connection | None = None
        self.assigned: collections.deque[int] = collections.deque()
        self.since = 0.0

    def hang_up(self) -> None:
        if self.connection is not None:
            self.connection.close()
        self.connection, self.pid = None, None


class _Warden:
    """The process that workers are forked from (`warden.py`); it ends when our end of its socket closes."""

    def __init__(self, memory_bytes: int):
        root = str(Path(__file__).parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        # A fixed hash seed: sympy orders some sets by hash, and a resumed run must judge as the first one did.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONHASHSEED": "0"}
        self.control, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "lmmr1_jax.rewards.warden", str(theirs.fileno()), str(memory_bytes)],
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
