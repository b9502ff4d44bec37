"""Accuracy of a model on a file of prompts with answers: unbiased pass@k, overall and per source of data.

    python -m lmmr1_jax.evaluate --model DIR --data test.jsonl --out result.json
    python -m lmmr1_jax.evaluate --model DIR --data test.jsonl --out result.json --n 16 --k 8 --temperature 0.6

Writes {"n", "k", "overall": {"pass@1", "pass@k", "format", "prompts"}, "sources": {NAME: {...}}, "skipped": {REASON:
rows}, "faults"}. Rows that can't be used are not in the figures; completions that the verifier can't judge (`faults`)
count as wrong.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from lmmr1_jax.commands.common import (
    add_sampling_flags,
    open_out,
    open_processor,
    open_sampler,
    parser,
    sampling_settings,
)
from lmmr1_jax.runtime.arguments import above_zero, positive
from lmmr1_jax.runtime.cli import run_cli
from lmmr1_jax.runtime.errors import UserError


def main(argv: list[str] | None = None) -> None:
    """The command."""
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
    processor = open_processor(args)

    from lmmr1_jax.config.schema import RewardsConfig
    from lmmr1_jax.data.prompt_set import read_prompts
    from lmmr1_jax.data.skips import SkipLog
    from lmmr1_jax.rewards.rules.assignment import check_sources, choose, readable
    from lmmr1_jax.rewards.rules.service import Verifier
    from lmmr1_jax.rollout.evaluation import evaluate

    rewards = RewardsConfig(
        variant=args.variant,
        timeout=args.timeout,
        workers=args.workers,
        verifier=args.verifier,
        verifiers=tuple(args.verifiers),
    )
    skips = SkipLog()
    with Verifier(rewards) as verifier:
        prompts = read_prompts(
            args.data,
            prompt_key=args.prompt_key,
            answer_key=args.answer_key,
            verifier_key=args.verifier_key,
            special_tokens=processor.special_tokens,
            skips=skips,
        )
        prompts = choose(prompts, rewards, args.verifier_key)
        check_sources(rewards, prompts)
        if args.variant == "default":
            prompts = readable(prompts, verifier, skips)
        with open_sampler(args, processor) as sampler, open_out(args.out) as out:
            result = evaluate(
                sampler,
                processor.decode,
                verifier,
                encoded_prompts(prompts, processor, skips),
                sampling_settings(args),
                n=args.n,
                k=args.k,
            )
            report = result.report() | {"skipped": dict(skips.counts), "faults": result.faults}
            out.write(json.dumps(report, indent=1) + "\n")
    overall = report["overall"]
    print(
        f"{args.out}: {overall['prompts']} prompts, pass@1 {overall['pass@1']:.4f}, pass@{args.k} "
        f"{overall['pass@k']:.4f}, format {overall['format']:.4f}, {skips.total} rows skipped",
        file=sys.stderr,
    )


def encoded_prompts(prompts: Any, processor: Any, skips: Any) -> Any:
    """Encodes prompt after prompt; those that can't be go to `skips`."""
    from lmmr1_jax.data.faults import SkipPrompt

    for prompt in prompts:
        try:
            yield processor.encode(prompt)
        except SkipPrompt as fault:
            skips.add(prompt.file, prompt.row, fault.reason, fault.detail)


if __name__ == "__main__":
    run_cli(main)
