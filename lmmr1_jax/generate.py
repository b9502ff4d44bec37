"""Sample completions for a file of prompts.

    python -m lmmr1_jax.generate --model DIR --data prompts.jsonl --out completions.jsonl --n 4 --temperature 1

Writes a line per input line: {"index", "prompt_token_ids", "completions": [{"text", "token_ids", "logprobs",
"finish_reason"}]}, or {"index", "error"} for a prompt that can't be used. Log-probs are the policy's: at the
temperature given (1 when greedy), vision tokens banned.
"""

from __future__ import annotations

from lmmr1_jax.commands.common import add_sampling_flags, model_config, parser
from lmmr1_jax.runtime.cli import run_cli


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    flags = parser("generate", __doc__.splitlines()[0])
    add_sampling_flags(flags, temperature=1.0)
    args = flags.parse_args(argv)
    config = model_config(args)
    from lmmr1_jax.commands.generate import generate_file  # JAX comes with it: what is mistyped is answered first

    generate_file(args, config)


if __name__ == "__main__":
    run_cli(main)
