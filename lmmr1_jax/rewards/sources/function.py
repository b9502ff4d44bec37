"""Your own reward function as a source. It runs in processes of its own, which a time limit can kill.

It is called for one prompt's completions at a time, so that what goes wrong concerns these and no others; several
prompts at a time where `rewards.function_workers` says so. docs/rewards.md has the two forms that a function may take.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmmr1_jax.config.schema import RewardsConfig
from lmmr1_jax.data.messages import without_pixels
from lmmr1_jax.rewards.sources.base import Group, Scored, nobody, refuse_fault
from lmmr1_jax.rewards.sources.specs import FunctionSpec
from lmmr1_jax.rewards.workers.pool import StartFailed, WorkerFailure, WorkerPool
from lmmr1_jax.runtime.errors import UserError
from lmmr1_jax.types.records import Reward


class FunctionSource:
    """A function from a file.

    Attributes:
      name: the head of its parts' names.
    """

    def __init__(self, spec: FunctionSpec, config: RewardsConfig):
        """Starts the processes, which load the file meanwhile."""
        self.name = spec.name
        self._weight, self._limit = spec.weight, config.function_timeout
        self._where = f"{spec.file}:{spec.function}" if spec.function else spec.file
        self._pool = WorkerPool(
            "lmmr1_jax.rewards.sources.function_job",
            spec.file,
            spec.function,
            workers=config.function_workers,
            timeout=config.function_timeout,
            start_timeout=config.function_timeout,
        )

    def check(self, group: Group) -> None:
        """`sources.RewardSource.check`: waits until the file is loaded, then tries the function."""
        try:
            self._pool.run([None])
        except StartFailed as error:
            raise UserError(f"rewards.functions: {self._where}: {error}") from None
        refuse_fault(self.score([group]))

    def score(self, groups: Sequence[Group], scored: Scored = nobody) -> list[list[Reward | WorkerFailure]]:
        """`sources.RewardSource.score`: every part is `NAME` or `NAME/PART`."""
        try:
            answers = self._pool.run(
                [as_data(group) for group in groups],
                on_answer=lambda index: scored(len(groups[index].rollout.completions)),
            )
        except StartFailed as error:  # it had to be started anew
            answers = [WorkerFailure("died", str(error))] * len(groups)
        return [self._results(answer, group) for answer, group in zip(answers, groups, strict=True)]

    def close(self) -> None:
        """Ends the processes."""
        self._pool.close()

    def _results(self, answer: Any, group: Group) -> list[Reward | WorkerFailure]:
        if isinstance(answer, WorkerFailure):
            reasons = {"timeout": f"took longer than rewards.function_timeout, {self._limit:g} s", "died": "died"}
            reason = answer.detail or reasons[answer.kind]
            prompt = group.rollout.encoded.prompt.prompt_id
            return [WorkerFailure(answer.kind, f"{self._where} {reason} (prompt {prompt!r})")] * len(group.texts)
        return [
            Reward(
                self._weight * earned,
                {f"{self.name}/{part}" if part else self.name: value for part, value in parts.items()},
            )
            for earned, parts in answer
        ]


def as_data(group: Group) -> dict[str, Any]:
    """A rollout as plain data, as the richer form of a reward function gets it."""
    encoded = group.rollout.encoded
    return {
        "prompt_id": encoded.prompt.prompt_id,
        "data_source": encoded.prompt.data_source,
        "label": encoded.prompt.label,
        "messages": without_pixels(encoded.prompt.messages),
        "prompt": group.raw_prompt,
        "images": [{"height": p.pixels.shape[0], "width": p.pixels.shape[1]} for p in encoded.images],
        "completions": [
            {
                "text": text,
                "raw_text": raw,
                "token_ids": [int(token) for token in completion.token_ids],
                "finish_reason": completion.finish_reason,
            }
            for text, raw, completion in zip(group.texts, group.raw_texts, group.rollout.completions, strict=True)
        ],
    }
