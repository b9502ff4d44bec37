"""Held-out prompts: encoded anew for every evaluation, in bounded memory; one that can't be used is counted once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lmmr1_jax.data.processor import Processor
from lmmr1_jax.data.prompt_loader import encode_all
from lmmr1_jax.data.skips import SkipLog
from lmmr1_jax.types.records import EncodedPrompt, Prompt


class HeldOut:
    """Prompts that are never trained on.

    Attributes:
      prompts: those that, as far as is known, can be used.
    """

    def __init__(self, prompts: Sequence[Prompt], processor: Processor, skips: SkipLog, *, workers: int = 2):
        self.prompts = list(prompts)
        self._processor, self._skips, self._workers = processor, skips, workers
        self._dropped: list[tuple[str, int]] = []

    def encoded(self) -> Iterator[EncodedPrompt]:
        """One pass in order."""
        found = SkipLog()
        yield from encode_all(self.prompts, self._processor, found, workers=self._workers)
        for record in found.records:
            self._skips.add(**record)
        self._drop([(record["file"], record["row"]) for record in found.records])

    def state_dict(self) -> list[tuple[str, int]]:
        """File and row of the prompts that were counted as skipped; what a checkpoint stores."""
        return list(self._dropped)

    def load_state_dict(self, state: Sequence[Any]) -> None:
        """Goes back to `state`."""
        self._drop([(file, row) for file, row in state])

    def _drop(self, rows: list[tuple[str, int]]) -> None:
        self._dropped += rows
        self.prompts = [prompt for prompt in self.prompts if (prompt.file, prompt.row) not in set(rows)]
