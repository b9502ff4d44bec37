"""Where a run stands: the one value that is either still true or replaced."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

from lmmr1_jax.learner.state import TrainState


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds, and only together.

    An update donates `state`; from then on the snapshot is no longer true and the step's end makes the next one.

    Attributes:
      step: steps that lie behind the run.
      state: the learner's state after them.
      host: the `state_dict` of every part of the run that remembers something between steps, by the part's name.
    """

    step: int
    state: TrainState
    host: dict[str, Any]


class Stateful(Protocol):
    """A part of the run that remembers something between steps."""

    def state_dict(self) -> Any:
        """What it remembers, as JSON can hold it."""
        ...

    def load_state_dict(self, state: Any) -> None:
        """Goes back to `state`."""
        ...


def take_snapshot(step: int, state: TrainState, parts: Mapping[str, Stateful]) -> Snapshot:
    """Where a run stands with this state behind `step` steps."""
    return Snapshot(step, state, {name: part.state_dict() for name, part in parts.items()})
