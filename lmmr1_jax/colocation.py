"""How much of a GPU goes to the learner where engines share it. It must run before JAX is imported."""

from __future__ import annotations

import os

from lmmr1_jax.config import VllmConfig

LEARNER_SHARE = "XLA_CLIENT_MEM_FRACTION"
"""JAX reads it once, when it first looks for devices."""


def share_devices(config: VllmConfig) -> None:
    """Leaves `memory_share` of each GPU to the engines; what the environment already says stays as it is."""
    if config.colocate and "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        os.environ.setdefault(LEARNER_SHARE, f"{1 - config.memory_share:.3f}")
