"""What the commands generate, score and evaluate share: flags, opening a model, encoding rows, writing lines."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmmr1_jax.config.renamed import FLAGS
from lmmr1_jax.config.schema import (
    DataConfig,
    LearnerConfig,
    ModelConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
    VllmConfig,
)
from lmmr1_jax.rollout.sampler_registry import SAMPLERS, sampler_entry
from lmmr1_jax.runtime.arguments import Parser, count, not_negative, positive, share
from lmmr1_jax.runtime.errors import UserError

if TYPE_CHECKING:
    from lmmr1_jax.rollout.sampler import Sampler, SamplingSettings


def parser(name: str, description: str) -> Parser:
    """A parser with the flags that all three commands take."""
    prog = f"python -m lmmr1_jax.{name}"
    flags = Parser(prog=prog, description=description, allow_abbrev=False, renamed=FLAGS)
    flags.add_argument("--model", required=True, metavar="DIR", help="Hugging Face folder")
    flags.add_argument("--data", required=True, metavar="FILE", help="JSON, JSONL or parquet of prompts")
    flags.add_argument("--out", required=True, metavar="FILE", help="file to write")
    flags.add_argument("--prompt-key", default="message", help="key of the messages (default: message)")
    flags.add_argument("--min-pixels", type=count, default=3136, help="smaller images are enlarged (default: 3136)")
    flags.add_argument(
        "--max-pixels", type=positive, default=1_003_520, help="larger images are reduced (default: 1003520)"
    )
    flags.add_argument("--max-prompt-tokens", type=positive, default=4096, help="longer prompts are refused (4096)")
    flags.add_argument("--allow-http", action="store_true", help="fetch images from http(s) addresses")
    flags.add_argument("--image-root", default="", metavar="DIR", help="read images from below this folder only")
    flags.add_argument("--compute-dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    return flags


def add_sampling_flags(flags: Parser, *, temperature: float) -> None:
    """The flags of everything that samples."""
    flags.add_argument("--n", type=positive, default=1, help="completions per prompt (default: 1)")
    flags.add_argument("--max-new-tokens", type=positive, default=1024, help="length limit (default: 1024)")
    flags.add_argument(
        "--temperature", type=not_negative, default=temperature, help=f"0 is greedy (default: {temperature:g})"
    )
    flags.add_argument("--top-p", type=share, default=1.0, help="sample from this much of the mass (default: 1, all)")
    flags.add_argument("--top-k", type=count, default=0, help="sample from so many ids (default: 0, all)")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--sampler", choices=tuple(SAMPLERS), default="jax")
    flags.add_argument("--max-images", type=positive, default=8, help="most images of a prompt, with vllm (default: 8)")
    flags.add_argument("--max-num-seqs", type=positive, default=256, help="completions at a time (default: 256)")


def sampling_settings(args: argparse.Namespace) -> SamplingSettings:
    """The `SamplingSettings` that `add_sampling_flags` asked for."""
    from lmmr1_jax.rollout.local.sampler import sampling_key
    from lmmr1_jax.rollout.sampler import SamplingSettings

    return SamplingSettings(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        key=sampling_key(args.seed, 0),
    )


def model_config(args: argparse.Namespace) -> TrainConfig:
    """What the flags say of model, data and sampler, in the words of a run's config.

    Raises:
      UserError: no such folder, or no such data: said before anything is loaded or written.
    """
    if not Path(args.model).is_dir():
        raise UserError(f"--model {args.model}: no such folder")
    if not Path(args.data).is_file():
        raise UserError(f"--data {args.data}: no such file")
    config = TrainConfig(
        model=ModelConfig(path=args.model, compute_dtype=args.compute_dtype),
        data=DataConfig(
            min_pixels=args.min_pixels,
            max_pixels=args.max_pixels,
            max_prompt_tokens=args.max_prompt_tokens,
            allow_http=args.allow_http,
            image_root=args.image_root,
        ),
        learner=LearnerConfig(remat="none"),
    )
    if "sampler" not in args:
        return config
    entry = sampler_entry(args.sampler)
    if args.temperature and not entry.samples_at(args.temperature):
        fault = f"with --sampler {args.sampler} it must be 0 or {entry.temperature_range}"
        raise UserError(f"--temperature is {args.temperature:g}; {fault}")
    return dataclasses.replace(
        config,
        run=RunConfig(seed=args.seed),
        rollout=RolloutConfig(sampler=args.sampler, max_new_tokens=args.max_new_tokens),
        vllm=VllmConfig(dtype=args.compute_dtype, max_images=args.max_images),
    )


@contextlib.contextmanager
def open_sampler(args: argparse.Namespace, config: TrainConfig, processor: Any) -> Iterator[Sampler]:
    """The sampler that was asked for, with the model's weights; it ends with the context. The processor skips prompts
    that it would not take.

    Args:
      args: of `add_sampling_flags`.
      config: of `model_config`.
      processor: the model's.
    """
    from lmmr1_jax.rollout.loaded_model import load_model
    from lmmr1_jax.rollout.sampler import apply_limits

    entry = sampler_entry(config.rollout.sampler)
    with entry.open(config, lambda: load_model(config, processor), max_num_seqs=args.max_num_seqs) as opened:
        model, sampler = opened
        apply_limits(processor, sampler.limits)
        sampler.load(model.load(model.network.compute_dtype), 0)
        yield sampler


def encoded_rows(args: argparse.Namespace, processor: Any) -> Iterator[tuple[int, dict[str, Any], Any]]:
    """Number, row, and the row's EncodedPrompt or the SkipPrompt that says why there is none."""
    from lmmr1_jax.data.faults import SkipPrompt
    from lmmr1_jax.data.prompt_files import read_rows
    from lmmr1_jax.data.prompt_set import prompt_from_row

    for number, row in read_rows(args.data):
        if isinstance(row, SkipPrompt):
            yield number, {}, row
            continue
        try:
            prompt = prompt_from_row(
                {**row, "answer": None},  # no answer is needed here, and a strange one does no harm
                number,
                file=str(args.data),
                prompt_key=args.prompt_key,
                special_tokens=processor.special_tokens,
            )
            yield number, row, processor.encode(prompt)
        except SkipPrompt as fault:
            yield number, row, fault


def in_parts(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` items, the last one shorter."""
    part: list[Any] = []
    for item in items:
        part.append(item)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part


def open_out(path: str) -> Any:
    """The output file, its folder made where it is missing."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        return open(path, "w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written: {error.strerror or error}") from None


def write_line(file: Any, line: dict[str, Any]) -> None:
    """One JSON object, on disk before the next prompts are sampled."""
    file.write(json.dumps(line, ensure_ascii=False) + "\n")
    file.flush()
