"""The work of `python -m lmmr1_jax.generate`."""

from __future__ import annotations

import argparse
import sys

from lmmr1_jax.commands.common import (
    encoded_rows,
    in_parts,
    open_out,
    open_sampler,
    sampling_settings,
    write_line,
)
from lmmr1_jax.config.schema import TrainConfig
from lmmr1_jax.data.faults import SkipPrompt
from lmmr1_jax.rollout.loaded_model import read_processor
from lmmr1_jax.rollout.sampler import sample

LINES_AT_A_TIME = 64


def generate_file(args: argparse.Namespace, config: TrainConfig) -> None:
    """Samples from the prompts of `args.data` and writes `args.out`, a line per row."""
    processor = read_processor(config)
    settings = sampling_settings(args)
    written = failed = 0
    with open_sampler(args, config, processor) as sampler, open_out(args.out) as out:
        for part in in_parts(encoded_rows(args, processor), LINES_AT_A_TIME):
            prompts = [encoded for _, _, encoded in part if not isinstance(encoded, SkipPrompt)]
            groups = iter(sample(sampler, prompts, args.n, settings))
            for index, _, encoded in part:
                written += 1
                if isinstance(encoded, SkipPrompt):
                    failed += 1
                    write_line(out, {"index": index, "error": str(encoded)})
                    continue
                completions = [
                    {
                        "text": processor.decode(completion.token_ids),
                        "token_ids": completion.token_ids.tolist(),
                        "logprobs": completion.log_probs.tolist(),
                        "finish_reason": completion.finish_reason,
                    }
                    for completion in next(groups)
                ]
                ids = encoded.token_ids.tolist()
                write_line(out, {"index": index, "prompt_token_ids": ids, "completions": completions})
    print(f"{args.out}: {written} lines, {failed} of them errors", file=sys.stderr)
