"""The process that reward workers are forked from.

    python -m lmmr1_jax.rewards.workers.fork_server FD MEMORY JOB ARGUMENTS...

A pool starts one fork server with a fresh interpreter, never by forking itself: it runs JAX. JOB is a module that
defines `prepare()`, called once before the forks, and `begin(*arguments)`, called in every worker, which returns the
function that answers tasks. The fork server prepares the rules once and then forks a worker whenever it is told to,
so a worker that had to be killed is replaced within milliseconds and shares the imported pages. What it is told is
one byte and one file descriptor over the socket FD: "kill the worker in this slot if there is one, and start another
that answers on this descriptor".

The fork server does nothing that can hang. When the run ends, however it ends, the socket closes and the fork server
kills its workers and ends; should the fork server itself be killed, Linux kills its workers. Interrupts and SIGTERM,
which reach the whole process group, are left to the run.

multiprocessing's forkserver would do most of this, but its workers import the run's main module again, keep the
server alive while they hang, and its settings are the process's, not ours. Each worker has a connection of its own:
one that dies holding a shared queue's lock would take the others with it.

Nothing here or in the jobs imports jax.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import resource
import signal
import socket
import sys
from multiprocessing.connection import Connection
from typing import Any

_PR_SET_PDEATHSIG = 1


LONGEST_DETAIL = 500
"""Characters kept of an error's text."""


def main(descriptor: int, memory_bytes: int, job: str, arguments: list[str]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    control = socket.socket(fileno=descriptor)
    server_pid = os.getpid()
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None  # before the forks: workers only call it
    work = importlib.import_module(job)
    work.prepare()
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
                    _limit(libc, server_pid, memory_bytes)
                    _serve(Connection(descriptors[0]), work, arguments)
                os._exit(0)
            os.close(descriptors[0])
            workers[slot] = pid
    except OSError:  # the run is gone
        pass
    for pid in workers.values():
        _kill(pid)


def _kill(pid: int) -> None:
    # Nobody else reaps these children, so the number still means the same process.
    with contextlib.suppress(ProcessLookupError):  # it has not come to have a group of its own
        os.killpg(pid, signal.SIGKILL)  # with whatever a reward function started
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _limit(libc: Any, server_pid: int, memory_bytes: int) -> None:
    os.setsid()
    if libc is not None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != server_pid:  # it died before the line above
            os._exit(0)
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # when memory runs out, take the worker, not the run
    if memory_bytes:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _serve(connection: Connection, work: Any, arguments: list[str]) -> None:
    """Say that the worker begins (0) and then that it is up (its pid), or why it isn't (a text); take lists of tasks
    and send one answer per task as soon as it is known, until the run hangs up.

    An answer is `(True, value)` or `(False, description of the error)`.
    """
    connection.send(0)
    try:
        answer_to = work.begin(*arguments)
    except BaseException as error:
        connection.send(str(error)[:LONGEST_DETAIL] or type(error).__name__)
        return
    connection.send(os.getpid())
    while True:
        for task in connection.recv():
            try:
                answer = True, answer_to(task)
            except Exception as error:  # MemoryError and RecursionError are among them
                answer = False, str(error)[:LONGEST_DETAIL] or type(error).__name__
            connection.send(answer)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
