"""Encoded prompts in the cursor's order, prepared ahead by threads, with what cannot be used skipped and counted."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from lmmr1_jax.data.faults import SkipPrompt
from lmmr1_jax.data.processor import Processor
from lmmr1_jax.data.prompt_set import PromptCursor
from lmmr1_jax.data.skips import SkipLog
from lmmr1_jax.runtime.errors import UserError
from lmmr1_jax.types.records import EncodedPrompt, Prompt


class PromptLoader:
    """Takes prompts from a cursor, encodes them in threads, gives them out in the cursor's order.

    What has been prepared but not taken does not count: `state` is the cursor's position behind the last row that was
    given out or skipped, so that a run that is killed and resumed sees each row exactly once.

    Attributes:
      used: prompts given out.
      animated: animated images among them, of which the first frame was used.
    """

    def __init__(
        self, cursor: PromptCursor, processor: Processor, skips: SkipLog, *, workers: int = 2, ahead: int = 32
    ):
        """At most `ahead` encoded prompts wait in memory; without workers prompts are encoded when they are taken."""
        self._cursor, self._processor, self._skips = cursor, processor, skips
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="prompts") if workers > 0 else None
        self._ahead = max(ahead, workers) if workers > 0 else 1
        self._waiting: collections.deque[tuple[Prompt, dict[str, int], Future | None]] = collections.deque()
        self._position = cursor.state_dict()
        self.used = 0
        self.animated = 0

    def take(self, count: int) -> list[EncodedPrompt]:
        """The next `count` prompts that can be used; rows that cannot are skipped, and the cursor goes on.

        Raises:
          UserError: a whole pass over the prompts gave nothing that can be used.
        """
        taken: list[EncodedPrompt] = []
        skipped_in_a_row = 0
        while len(taken) < count:
            self._fill()
            prompt, position, future = self._waiting.popleft()
            try:
                encoded = self._processor.encode(prompt) if future is None else future.result()
            except SkipPrompt as fault:
                self._skips.add(prompt.file, prompt.row, fault.reason, fault.detail)
                skipped_in_a_row += 1
                if skipped_in_a_row >= len(self._cursor):
                    raise UserError(
                        f"{prompt.file}: a whole pass over the prompts gave none that can be used; the last: {fault}"
                    ) from None
            else:
                taken.append(encoded)
                skipped_in_a_row = 0
                self.used += 1
                self.animated += sum(image.animated for image in encoded.images)
            self._position = position
        if self._pool is not None:
            self._fill()  # the next batch is prepared while this one is trained on
        return taken

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint stores."""
        return {"cursor": self._position, "used": self.used, "animated": self.animated}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Back to `state`; what was prepared is thrown away."""
        self._drop_waiting()
        self._cursor.load_state_dict(state["cursor"])
        self._position = self._cursor.state_dict()
        self.used, self.animated = state["used"], state["animated"]

    def close(self) -> None:
        """Ends the threads."""
        self._drop_waiting()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _fill(self) -> None:
        while len(self._waiting) < self._ahead:
            prompt = self._cursor.next()
            future = None if self._pool is None else self._pool.submit(self._processor.encode, prompt)
            self._waiting.append((prompt, self._cursor.state_dict(), future))

    def _drop_waiting(self) -> None:
        for _, _, future in self._waiting:
            if future is not None:
                future.cancel()
        self._waiting.clear()


def encode_all(
    prompts: Iterable[Prompt], processor: Processor, skips: SkipLog, *, workers: int = 2, ahead: int = 32
) -> Iterator[EncodedPrompt]:
    """One pass over prompts, as evaluation needs it: in their order, those that cannot be used skipped and counted."""
    if workers <= 0:
        workers = ahead = 1
    with ThreadPoolExecutor(workers, thread_name_prefix="prompts") as pool:
        waiting: collections.deque[tuple[Prompt, Future]] = collections.deque()
        source = iter(prompts)
        try:
            while True:
                while len(waiting) < ahead and (prompt := next(source, None)) is not None:
                    waiting.append((prompt, pool.submit(processor.encode, prompt)))
                if not waiting:
                    return
                prompt, future = waiting.popleft()
                try:
                    encoded = future.result()
                except SkipPrompt as fault:
                    skips.add(prompt.file, prompt.row, fault.reason, fault.detail)
                else:
                    yield encoded
        finally:
            for _, future in waiting:
                future.cancel()
