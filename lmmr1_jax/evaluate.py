"""Accuracy of a model on a file of prompts with answers: unbiased pass@k, overall and per source of data.

    python -m lmmr1_jax.evaluate --model DIR --data test.jsonl --out result.json
    python -m lmmr1_jax.evaluate --model DIR --data test.jsonl --out result.json --n 16 --k 8 --temperature 0.6

Writes {"n", "k", "overall": {"pass@1", "pass@k", "format", "prompts"}, "sources": {NAME: {...}}, "skipped": {REASON:
rows}, "faults"}. Rows that can't be used are not in the figures; completions that the verifier can't judge (`faults`)
count as wrong.
"""

from __future__ import annotations

from lmmr1_jax.commands.common import add_sampling_flags, model_config, parser
from lmmr1_jax.runtime.arguments import above_zero, positive
from lmmr1_jax.runtime.cli import run_cli
from lmmr1_jax.runtime.errors import UserError


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    flags = parser("evaluate", __doc__.splitlines()[0])
    add_sampling_flags(flags, temperature=0.0)
    flags.add_argument("--k", type=positive, default=1, help="of pass@k, at most n (default: 1)")
    flags.add_argument("--answer-key", default="answer", help="key of the gold answer (default: answer)")
    flags.add_argument("--variant", choices=("default", "lmm-r1"), default="default", help="rules of the verifier")
    flags.add_argument("--verifier", default="math", help="math, number, number:0.05, choice or text (default: math)")
    flags.add_argument(
        "--verifiers", nargs="+", default=(), metavar="SOURCE=VERIFIER", help="other verifiers for some data sources"
    )
    flags.add_argument("--verifier-key", default="verifier", help="key by which a row names its own (verifier)")
    flags.add_argument("--timeout", type=above_zero, default=5.0, help="seconds for judging a completion")
    flags.add_argument("--workers", type=positive, default=2, help="verifier processes")
    args = flags.parse_args(argv)
    if args.k > args.n:
        raise UserError(f"--k {args.k} must be at most --n {args.n}")
    config = model_config(args)
    from lmmr1_jax.commands.evaluate import evaluate_file  # JAX comes with it: what is mistyped is answered first

    evaluate_file(args, config)


if __name__ == "__main__":
    run_cli(main)
