"""The range of a field's values, which stands beside the field: `Annotated[float, above(0)]`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Range:
    """Which numbers a field may hold. NaN compares as false, so it is outside every range.

    Attributes:
      wanted: the range in words, for "it must be ...".
      holds: whether a number is inside.
      infinite: whether infinities may be inside, for a limit that may be no limit.
    """

    wanted: str
    holds: Callable[[float], bool]
    infinite: bool = False

    def missed_by(self, value: float) -> str:
        """What `value` would have to be and is not; empty where it is inside."""
        if not self.holds(value):
            return self.wanted
        return "" if self.infinite or math.isfinite(value) else ANY.wanted


def at_least(low: float) -> Range:
    """`low` and more."""
    return Range(f"at least {low}", lambda value: value >= low)


def above(low: float, *, infinite: bool = False) -> Range:
    """More than `low`."""
    return Range(f"above {low}", lambda value: value > low, infinite)


ANY = Range("a finite number", lambda value: not math.isnan(value))
"""The range of a field that names none."""
FRACTION = Range("from 0 to 1", lambda value: 0 <= value <= 1)
SHARE = Range("above 0 and at most 1", lambda value: 0 < value <= 1)
DECAY = Range("from 0 to below 1", lambda value: 0 <= value < 1)
ABOVE_1_OR_OFF = Range("0 or above 1", lambda value: value == 0 or value > 1)
