"""The work of `python -m lmmr1_jax.score`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np

from lmmr1_jax.commands.common import encoded_rows, in_parts, open_out, write_line
from lmmr1_jax.config.schema import TrainConfig
from lmmr1_jax.data.faults import SkipPrompt
from lmmr1_jax.data.processor import Processor
from lmmr1_jax.rollout.loaded_model import load_model
from lmmr1_jax.rollout.local.scoring import Scorer

LINES_AT_A_TIME = 64


def score_file(args: argparse.Namespace, config: TrainConfig) -> None:
    """Scores the completions of `args.data` and writes `args.out`, a line per row."""
    model = load_model(config)
    processor = model.processor
    scorer = Scorer(model.network, model.load(model.network.compute_dtype), processor.patches)
    written = failed = 0
    with open_out(args.out) as out:
        for part in in_parts(encoded_rows(args, processor), LINES_AT_A_TIME):
            lines: list[dict[str, Any]] = []
            pairs, places = [], []
            for index, row, encoded in part:
                if isinstance(encoded, SkipPrompt):
                    lines.append({"index": index, "error": str(encoded)})
                    continue
                completion = completion_ids(row, processor, model.network.config.text.vocab_size)
                if isinstance(completion, str):
                    lines.append({"index": index, "error": completion})
                    continue
                places.append(len(lines))
                pairs.append((encoded, completion))
                ids = {"prompt_token_ids": encoded.token_ids.tolist(), "completion_ids": completion.tolist()}
                lines.append({"index": index, **ids})
            for place, log_probs in zip(places, scorer.score(pairs), strict=True):
                lines[place]["logprobs"] = log_probs.tolist()
            for line in lines:
                write_line(out, line)
            written += len(lines)
            failed += len(lines) - len(pairs)
    print(f"{args.out}: {written} lines, {failed} of them errors", file=sys.stderr)


def completion_ids(row: dict[str, Any], processor: Processor, vocabulary: int) -> Any:
    """The row's completion as int32 ids, or what is wrong with it in a line."""
    ids, text = row.get("completion_ids"), row.get("completion")
    if ids is None:
        if not isinstance(text, str):
            return "no_completion: the row has neither 'completion' (text) nor 'completion_ids'"
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            return "bad_completion: 'completion' holds half a surrogate pair, which is not Unicode text"
        return processor.encode_text(text)
    whole = isinstance(ids, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in ids)
    if not whole or not all(0 <= i < vocabulary for i in ids):
        return f"bad_completion_ids: 'completion_ids' must be a list of ids from 0 to {vocabulary - 1}"
    return np.asarray(ids, np.int32)
