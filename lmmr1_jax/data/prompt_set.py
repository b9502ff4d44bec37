"""Prompt files (JSON, JSONL, parquet) as a list of whole prompts, and the cursor that walks over them.

What is wrong with a row's text is found here, when the file is read; what is wrong with an image is found when the
processor fetches it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmmr1_jax.data.faults import NO_ANSWER, NO_MESSAGE, SkipPrompt
from lmmr1_jax.data.messages import parse_answer, parse_messages, refuse_special_tokens
from lmmr1_jax.data.prompt_files import read_rows
from lmmr1_jax.data.skips import SkipLog
from lmmr1_jax.runtime.errors import UserError
from lmmr1_jax.types.records import Prompt

HOLDOUT_ROWS, HOLDOUT_SHARE = 256, 10  # the last min(256, 10 %) rows


def read_prompts(
    path: str | Path,
    *,
    prompt_key: str = "message",
    answer_key: str = "answer",
    need_answer: bool = True,
    verifier_key: str = "verifier",
    special_tokens: Sequence[str] = (),
    skips: SkipLog,
) -> list[Prompt]:
    """Reads a prompt file; rows that cannot be used go to `skips`.

    Args:
      path: a .json (list of objects), .jsonl or .parquet file.
      prompt_key: the row's key of the messages.
      answer_key: the row's key of the gold answer.
      need_answer: skip rows without an answer.
      verifier_key: the row's key of its verifier's name.
      special_tokens: strings that no text may hold (`Processor.special_tokens`).
      skips: where skipped rows are counted.

    Raises:
      UserError: the file cannot be read, or no row of it can be used.
    """
    path = Path(path)
    rows = read_rows(path)
    prompts = prompts_from_rows(
        rows,
        file=str(path),
        prompt_key=prompt_key,
        answer_key=answer_key,
        need_answer=need_answer,
        verifier_key=verifier_key,
        special_tokens=special_tokens,
        skips=skips,
    )
    if not prompts:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skips.counts.items()) or "it has no rows"
        raise UserError(f"{path}: no row can be used ({reasons})")
    return prompts


def prompts_from_rows(
    rows: Iterable[tuple[int, dict[str, Any] | SkipPrompt]],
    *,
    file: str,
    prompt_key: str = "message",
    answer_key: str = "answer",
    need_answer: bool = True,
    verifier_key: str = "verifier",
    special_tokens: Sequence[str] = (),
    skips: SkipLog,
) -> list[Prompt]:
    """Prompts of numbered rows, wherever they come from (`enumerate(...)` of objects made in memory, or `read_rows`).

    Args as for `read_prompts`; `file` names the source and gives relative image paths their folder.
    """
    prompts: list[Prompt] = []
    names: set[str] = set()
    for number, row in rows:
        try:
            if isinstance(row, SkipPrompt):
                raise row
            prompt = prompt_from_row(
                row,
                number,
                file=file,
                prompt_key=prompt_key,
                answer_key=answer_key,
                verifier_key=verifier_key,
                special_tokens=special_tokens,
            )
            if need_answer and prompt.label is None:
                raise SkipPrompt(NO_ANSWER, f"the row has no {answer_key!r}")
        except SkipPrompt as fault:
            skips.add(file, number, fault.reason, fault.detail)
            continue
        if prompt.prompt_id in names:  # groups are named by it
            prompt = Prompt(**{**vars(prompt), "prompt_id": f"{prompt.prompt_id}#{number}"})
        names.add(prompt.prompt_id)
        prompts.append(prompt)
    return prompts


def prompt_from_row(
    row: dict[str, Any],
    number: int,
    *,
    file: str,
    prompt_key: str = "message",
    answer_key: str = "answer",
    verifier_key: str = "verifier",
    special_tokens: Sequence[str] = (),
) -> Prompt:
    """The prompt that a row holds; its label is None where the row has no answer.

    Raises:
      SkipPrompt: the row's messages or answer cannot be used.
    """
    if row.get(prompt_key) is None:
        raise SkipPrompt(NO_MESSAGE, f"the row has no {prompt_key!r}")
    messages = parse_messages(row[prompt_key])
    refuse_special_tokens(messages, special_tokens)
    source, name = row.get("data_source"), row.get("id")
    return Prompt(
        messages=messages,
        label=parse_answer(row.get(answer_key)),
        prompt_id=str(number if name is None else name),
        data_source=str(source) if source else Path(file).stem,
        file=file,
        row=number,
        verifier=str((row.get(verifier_key) if verifier_key else None) or ""),
    )


def split_holdout(prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to train on, and the last min(256, 10 %) of them, held out for evaluation."""
    held_out = min(HOLDOUT_ROWS, len(prompts) // HOLDOUT_SHARE)
    cut = len(prompts) - held_out
    return list(prompts[:cut]), list(prompts[cut:])


class PromptCursor:
    """Walks over a prompt set for ever, epoch by epoch; where it stands is two numbers.

    The order of an epoch is a function of the seed and the epoch's number alone.
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, shuffle: bool = True):
        if not prompts:
            raise UserError("there are no prompts to draw from")
        self.prompts = prompts
        self._seed, self._shuffle = seed, shuffle
        self._epoch, self._index = 0, 0
        self._order = self._epoch_order(0)

    def __len__(self) -> int:
        return len(self.prompts)

    def next(self) -> Prompt:
        """The next prompt; after an epoch's last comes the next epoch's first."""
        if self._index == len(self.prompts):
            self._epoch, self._index = self._epoch + 1, 0
            self._order = self._epoch_order(self._epoch)
        self._index += 1
        return self.prompts[self._order[self._index - 1]]

    def state_dict(self) -> dict[str, int]:
        """Where the cursor stands, for a checkpoint."""
        return {"epoch": self._epoch, "index": self._index, "prompts": len(self.prompts)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Back to where `state` was taken.

        Raises:
          UserError: the prompt set has another size than it had then.
        """
        if state["prompts"] != len(self.prompts):
            raise UserError(
                f"the prompt set has {len(self.prompts)} usable rows but had {state['prompts']} when the checkpoint "
                "was written: resume with the same data"
            )
        self._epoch, self._index = int(state["epoch"]), int(state["index"])
        self._order = self._epoch_order(self._epoch)

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if not self._shuffle:
            return np.arange(len(self.prompts))
        seeds = np.random.SeedSequence([self._seed % 2**64, epoch])
        return np.random.Generator(np.random.Philox(seeds)).permutation(len(self.prompts))
