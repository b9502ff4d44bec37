"""Log-probs of given completions under a model.

    python -m lmmr1_jax.score --model DIR --data pairs.jsonl --out scores.jsonl

Reads `message` and `completion` (text, tokenized as it stands, nothing appended) or `completion_ids`; writes
{"index", "prompt_token_ids", "completion_ids", "logprobs"} or {"index", "error"} a line. Log-probs are the model's own:
nothing banned, temperature 1.
"""

from __future__ import annotations

from lmmr1_jax.commands.common import model_config, parser
from lmmr1_jax.runtime.cli import run_cli


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    args = parser("score", __doc__.splitlines()[0]).parse_args(argv)
    config = model_config(args)
    from lmmr1_jax.commands.score import score_file  # JAX comes with it: what is mistyped is answered first

    score_file(args, config)


if __name__ == "__main__":
    run_cli(main)
