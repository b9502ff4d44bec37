"""Sample completions for a file of prompts.

    python -m lmmr1_jax.generate --model DIR --data prompts.jsonl --out completions.jsonl --n 4 --temperature 1

Writes a line per input line: {"index", "prompt_token_ids", "completions": [{"text", "token_ids", "logprobs",
"finish_reason"}]}, or {"index", "error"} for a prompt that can't be used. Log-probs are the policy's: at the
temperature given (1 when greedy), vision tokens banned.
"""

from __future__ import annotations

import sys

from lmmr1_jax.commands.common import (
    add_sampling_flags,
    encoded_rows,
    in_parts,
    open_out,
    open_processor,
    open_sampler,
    parser,
    sampling_settings,
    write_line,
)
from lmmr1_jax.runtime.cli import run_cli

LINES_AT_A_TIME = 64


def main(argv: list[str] | None = None) -> None:
    """The command."""
    flags = parser("generate", __doc__.splitlines()[0])
    add_sampling_flags(flags, temperature=1.0)
    args = flags.parse_args(argv)
    processor = open_processor(args)

    from lmmr1_jax.data.faults import SkipPrompt
    from lmmr1_jax.rollout.sampler import sample

    settings = sampling_settings(args)
    written = failed = 0
    with open_sampler(args, processor) as sampler, open_out(args.out) as out:
        for part in in_parts(encoded_rows(args, processor), LINES_AT_A_TIME):
            groups = iter(
                sample(
                    sampler,
                    [encoded for _, _, encoded in part if not isinstance(encoded, SkipPrompt)],
                    args.n,
                    settings,
                )
            )
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


if __name__ == "__main__":
    run_cli(main)
