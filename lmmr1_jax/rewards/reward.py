"""What a completion earned. Nothing here imports jax: the verifier's server knows rewards too."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Reward:
    """A completion's reward.

    Attributes:
      total: the number that the algorithm sees.
      parts: named parts, each before its weight, e.g. {"accuracy": 1.0, "format": 0.0}.
      fault: why a judge could not judge it ("timeout", "died", "error"), None when all could; `total` is 0 then.
    """

    total: float
    parts: dict[str, float]
    fault: str | None = None
