"""Rollout batches in the learner's order, the next ones begun before the last one is learned from."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from lmmr1_jax.data.prompt_loader import PromptLoader
from lmmr1_jax.data.skips import SkipLog
from lmmr1_jax.types.records import EncodedPrompt, Rollout


@dataclasses.dataclass(frozen=True)
class _Begun:
    """A batch on its way: how to wait for it, and where the data stood before its prompts were taken."""

    collect: Callable[[], list[Rollout]]
    before: dict[str, Any]


class RolloutQueue:
    """Takes prompts, begins to sample from them, and gives out whole batches.

    With `staleness` s, batch t is begun when batch t - s is given out, so that no token of it is sampled by weights
    that have seen fewer than t - s updates. With 0 nothing is begun before it is wanted.

    What has been begun but not given out does not count: `state` is where the data stood before it, and a resumed run
    samples it again, from the weights it has then.
    """

    def __init__(
        self,
        loader: PromptLoader,
        skips: SkipLog,
        begin: Callable[[Sequence[EncodedPrompt], int], Callable[[], list[Rollout]]],
        *,
        prompts: int,
        staleness: int,
        batches: int,
    ):
        """
        Args:
          loader, skips: the data.
          begin: begins to sample from prompts for the step of that number; what it returns waits for the groups.
          prompts: of a batch.
          staleness: batches that are begun before the one that is wanted is waited for.
          batches: of the whole run.
        """
        self._loader, self._skips, self._begin = loader, skips, begin
        self._prompts, self._staleness, self._batches = prompts, staleness, batches
        self._begun: collections.deque[_Begun] = collections.deque()

    def next(self, number: int) -> list[Rollout]:
        """Batch `number`; called with each number in turn."""
        while len(self._begun) <= self._staleness and number + len(self._begun) < self._batches:
            before = self._data()
            prompts = self._loader.take(self._prompts)
            self._begun.append(_Begun(self._begin(prompts, number + len(self._begun)), before))
        # Taken off only when it is there: a stop in between loses nothing.
        rollouts = self._begun[0].collect()
        self._begun.popleft()
        return rollouts

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint stores."""
        return self._begun[0].before if self._begun else self._data()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to `state`."""
        self._begun.clear()
        self._loader.load_state_dict(state["loader"])
        self._skips.load_state_dict(state["skips"])

    def _data(self) -> dict[str, Any]:
        return {"loader": self._loader.state_dict(), "skips": self._skips.state_dict()}
