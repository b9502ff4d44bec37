"""All that is used of Ray beyond its public interface, as it is in Ray 2.60. Look here first when Ray is updated.

Each function says what it touches and why there is no public way.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

_BEYOND_LOCALHOST = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray's switch for listening on more than localhost, on Linux too."""


def set_environment() -> None:
    """Ray's internal settings, before it is imported.

    `free_objects_batch_size`: the store gives a bucket's memory back when its last reader is done, not up to a second
    later together with others.
    """
    os.environ.setdefault("RAY_free_objects_batch_size", "1")


@contextlib.contextmanager
def worker_logs_off() -> Iterator[None]:
    """Inside, Ray does not print its pages on a process or a machine that died; the fleet logs a line.

    `worker._worker_logs_enabled`: the public `log_to_driver` does not keep these messages away.
    """
    from ray._private import worker

    before = worker._worker_logs_enabled
    worker._worker_logs_enabled = False
    try:
        yield
    finally:
        worker._worker_logs_enabled = before


@contextlib.contextmanager
def on_localhost() -> Iterator[None]:
    """A cluster that is started inside binds to the loopback interface alone, as Ray's clusters do on a laptop, and one
    that does so is found there.

    `ray_constants.ENABLE_RAY_CLUSTER`: Ray has no argument for it; 127.0.0.1 as the node's address it takes for a
    mistake, and looks for another.
    """
    told = os.environ.get(_BEYOND_LOCALHOST)
    os.environ[_BEYOND_LOCALHOST] = "0"  # for Ray's processes, and for this one if it has not imported Ray yet
    before = True
    if (constants := sys.modules.get("ray._private.ray_constants")) is not None:
        before, constants.ENABLE_RAY_CLUSTER = constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        if (constants := sys.modules.get("ray._private.ray_constants")) is not None:
            constants.ENABLE_RAY_CLUSTER = before
        os.environ.pop(_BEYOND_LOCALHOST)
        if told is not None:
            os.environ[_BEYOND_LOCALHOST] = told


@contextlib.contextmanager
def pickled(reference: Any) -> Iterator[bytes]:
    """A reference for processes that are not this actor's own, valid inside.

    `core_worker.remove_object_ref_reference`: Ray keeps what is pickled outside of its own calls for as long as this
    process lives, every bucket of every update; there is no public way to take that back.
    """
    import ray
    from ray._private.worker import global_worker

    content = ray.cloudpickle.dumps(reference)
    try:
        yield content
    finally:
        global_worker.core_worker.remove_object_ref_reference(reference)
