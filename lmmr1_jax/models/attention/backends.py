"""The attention backends by name. A kernel for an accelerator is a file beside `xla.py` and a line here."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal

from jaxtyping import Array, Float

from lmmr1_jax.models.attention import xla
from lmmr1_jax.models.attention.mask import KeyIntervals

_log = logging.getLogger(__name__)

Queries = Float[Array, "batch queries heads width"]
Keys = Float[Array, "batch keys kv_heads width"]
Attend = Callable[[Queries, Keys, Keys, KeyIntervals], tuple[Queries, Float[Array, "batch heads queries"]]]
"""`attend(q, k, v, mask) -> (out, lse)`; what it promises stands at `xla.attend`, the oracle of all the others."""

BACKENDS: dict[str, Attend] = {"xla": xla.attend}


def resolve(name: Literal["auto", "xla"]) -> str:
    """The backend that `model.attention` chooses, logged; "auto" is the fastest that runs on these devices."""
    chosen = "xla" if name == "auto" else name
    _log.info("attention: %s", chosen)
    return chosen
