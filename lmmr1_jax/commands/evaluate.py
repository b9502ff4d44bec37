"""The work of `python -m lmmr1_jax.evaluate`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator

from lmmr1_jax.commands.common import open_out, open_sampler, sampling_settings
from lmmr1_jax.config.schema import RewardsConfig, TrainConfig
from lmmr1_jax.data.faults import SkipPrompt
from lmmr1_jax.data.processor import Processor
from lmmr1_jax.data.prompt_set import read_prompts
from lmmr1_jax.data.skips import SkipLog
from lmmr1_jax.rewards.rules.assignment import check_sources, choose, readable
from lmmr1_jax.rewards.rules.service import Verifier
from lmmr1_jax.rollout.evaluation import evaluate
from lmmr1_jax.rollout.loaded_model import read_processor
from lmmr1_jax.types.records import EncodedPrompt, Prompt


def evaluate_file(args: argparse.Namespace, config: TrainConfig) -> None:
    """Evaluates the model on the prompts of `args.data` and writes `args.out`."""
    processor = read_processor(config)
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
        with open_sampler(args, config, processor) as sampler, open_out(args.out) as out:
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


def encoded_prompts(prompts: Iterable[Prompt], processor: Processor, skips: SkipLog) -> Iterator[EncodedPrompt]:
    """Encodes prompt after prompt; those that can't be go to `skips`."""
    for prompt in prompts:
        try:
            yield processor.encode(prompt)
        except SkipPrompt as fault:
            skips.add(prompt.file, prompt.row, fault.reason, fault.detail)
