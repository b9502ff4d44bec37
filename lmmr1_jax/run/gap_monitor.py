"""Watches the gap between the learner's and the sampler's log-probs at equal weights: silent staleness is the worst
fault that such a system can have, and the gap is where it shows."""

from __future__ import annotations

from lmmr1_jax.runtime.errors import UserError

PATIENCE = 3
"""Steps in a row above the limit that end a run."""


class LogProbGapMonitor:
    """Counts the steps in a row whose mean gap was too large."""

    def __init__(self, warn: float, stop: float):
        self._warn, self._stop = warn, stop
        self._in_a_row = 0

    def observe(self, step: int, mean: float) -> str | None:
        """A step's mean gap in nats; returns a warning, or None.

        Raises:
          UserError: it was above the limit for 3 steps in a row.
        """
        # A gap that is no number compares as no greater than anything, and is the worst of all.
        self._in_a_row = 0 if mean <= self._stop else self._in_a_row + 1
        if self._in_a_row >= PATIENCE:
            raise UserError(
                f"step {step}: the sampler's log-probs differ from the learner's by {mean:.3g} on average, for the "
                f"{PATIENCE}rd step in a row above rollout.gap_stop={self._stop}: the sampler has other weights, "
                "prompts or images than the learner; when that is mended, --resume goes on from the newest checkpoint"
            )
        if mean <= self._warn:
            return None
        return f"step {step}: the sampler's log-probs differ from the learner's by {mean:.3g} on average"

    def state_dict(self) -> int:
        """What a checkpoint stores."""
        return self._in_a_row

    def load_state_dict(self, state: int) -> None:
        """Goes back to `state`."""
        self._in_a_row = int(state)
