"""The process that reward workers are forked from: `python -m lmmr1_jax.rewards.warden FD`.

A run starts one warden with a fresh interpreter, never by forking itself: it runs JAX. The warden imports the rules
once and then forks a worker whenever it is told to, so a worker that had to be killed is replaced within milliseconds
and shares the imported pages. What it is told is one byte and one file descriptor over the socket FD: "kill the worker
in this slot if there is one, and start another that answers on this descriptor".

The warden does nothing that can hang. When the run ends, however it ends, the socket closes and the warden kills its
workers and ends; should the warden itself be killed, Linux kills its workers. Interrupts and SIGTERM, which reach
the whole process group, are left to the run.

multiprocessing's forkserver would do most of this, but its workers import the run's main module again, keep the server
alive while they hang, and its settings are the process's, not ours. Each worker has a connection of its own: one that
dies holding a shared queue's lock would take the others with it.

Nothing here or in the rules imports jax.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
import signal
import socket
import sys
from multiprocessing.connection import Connection
from typing import Any

TASKS = ("grade", "gold_is_parsable")
"""Functions of `rules` that a worker runs."""

_PR_SET_PDEATHSIG = 1


def main(descriptor: int, memory_bytes: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    control = socket.socket(fileno=descriptor)
    warden = os.getpid()
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None  # before the forks: workers only call it
    _warm_up()
    workers: dict[int, int] = {}
    try:
        while True:
            message, descriptors, _, _ = socket.recv_fds(control, 1, 1)
            if not message:
                break
            slot = message[0]
            if slot in workers:
                _kill(workers.pop(slot))
            pid = os.fork()
            if pid == 0:
                with contextlib.suppress(BaseException):
                    control.close()
                    _limit(libc, warden, memory_bytes)
                    _serve(Connection(descriptors[0]))
                os._exit(0)
            os.close(descriptors[0])
            workers[slot] = pid
    except OSError:  # the run is gone
        pass
    for pid in workers.values():
        _kill(pid)


def _kill(pid: int) -> None:
    # Nobody else reaps these children, so the number still means the same process.
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _warm_up() -> None:
    """The first answer of each kind costs sympy's and antlr's caches some 100 ms; forks start with them filled."""
    from lmmr1_jax.rewards import rules

    for label in ("$\\boxed{60}$", "\\frac{1}{2}", "x^2+1", "A"):
        for answer in (label, "2"):
            for variant in ("default", "lmm-r1"):
                rules.grade(f"<think>1</think><answer>${answer}$</answer>", label, variant)
    gc.collect()
    gc.freeze()


def _limit(libc: Any, warden: int, memory_bytes: int) -> None:
    if libc is not None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != warden:  # it died before the line above
            os._exit(0)
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # when memory runs out, take the worker, not the run
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open(os.devnull, "w") as nowhere:  # parsers complain to the console
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)


def _serve(connection: Connection) -> None:
    """Take lists of (task, arguments) and send one answer per entry as soon as it is known, until the run hangs up.

    An answer is `(True, value)` or `(False, description of the error)`.
    """
    from lmmr1_jax.rewards import rules

    connection.send(os.getpid())
    while True:
        for task, arguments in connection.recv():
            if task not in TASKS:
                raise ValueError(task)
            try:
                answer = True, getattr(rules, task)(*arguments)
            except Exception as error:  # MemoryError and RecursionError are among them
                answer = False, type(error).__name__
            connection.send(answer)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
