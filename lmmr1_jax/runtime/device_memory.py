"""How much of a GPU goes to the learner where engines share it. It must run before JAX is imported."""

from __future__ import annotations

import contextlib
import ctypes
import os

LEARNER_SHARE = "XLA_CLIENT_MEM_FRACTION"
"""JAX reads it once, when it first looks for devices."""
CONTEXTS = 0.05
"""Share of a GPU that neither side counts as its own: two CUDA contexts, NCCL's buffers. Without it vLLM refuses to
start, because less than its share is free."""


def reserve_device_memory(colocated: bool, engines_share: float) -> None:
    """Leaves `engines_share` and `CONTEXTS` of each GPU where engines are colocated with the learner; what the
    environment already says stays as it is. It must run before JAX is imported."""
    if colocated and "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        os.environ.setdefault(LEARNER_SHARE, f"{1 - engines_share - CONTEXTS:.3f}")


def release_memory() -> None:
    """Hands what compiling left unused back to the operating system: hundreds of MiB, which glibc would keep."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
