"""What the commands generate, score and evaluate share: flags, opening a model, encoding rows, writing lines."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lmmr1_jax.config.renamed import FLAGS
from lmmr1_jax.runtime.arguments import Parser, count, not_negative, positive, share
from lmmr1_jax.runtime.errors import UserError


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
    flags.add_argument("--sampler", choices=("jax", "vllm"), default="jax")
    flags.add_argument("--max-images", type=positive, default=8, help="most images of a prompt, with vllm (default: 8)")
    flags.add_argument("--max-num-seqs", type=positive, default=256, help="completions at a time (default: 256)")


def open_processor(args: argparse.Namespace):
    """The model folder's processor.

    Raises:
      UserError: no such folder, or no such data: said before anything is loaded or written.
    """
    from lmmr1_jax.data.processor import Processor

    if not Path(args.model).is_dir():
        raise UserError(f"--model {args.model}: no such folder")
    if not Path(args.data).is_file():
        raise UserError(f"--data {args.data}: no such file")
    return Processor(
        args.model,
        min_pixels=args.min_pixels,
        max_pixels=args.max_pixels,
        max_prompt_tokens=args.max_prompt_tokens,
        allow_http=args.allow_http,
        image_root=args.image_root or None,
    )


def open_model(args: argparse.Namespace) -> tuple[Any, Mapping[str, Any], Any]:
    """The network, its parameters in the compute dtype, and the mesh (None for a single device)."""
    import jax
    import jax.numpy as jnp

    from lmmr1_jax.config.schema import MeshConfig
    from lmmr1_jax.models.config import read_config
    from lmmr1_jax.models.network import build
    from lmmr1_jax.parallel.sharding import make_mesh, sharding_of
    from lmmr1_jax.runtime.compilation import enable_compilation_cache
    from weights_bridge.load import load

    enable_compilation_cache()
    dtype = args.compute_dtype
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    network = build(read_config(args.model), compute_dtype=jnp.dtype(dtype))
    mesh = make_mesh(MeshConfig()) if jax.device_count() > 1 else None
    params = load(args.model, None if mesh is None else sharding_of(mesh), dtype=jnp.dtype(dtype))
    return network, params, mesh


@contextlib.contextmanager
def open_sampler(args: argparse.Namespace, processor: Any) -> Iterator[Any]:
    """The sampler that was asked for, with the model's weights; an engine ends with the context."""
    if args.sampler == "vllm":
        with _open_vllm(args, processor) as sampler:
            yield sampler
        return
    from lmmr1_jax.rollout.local.sampler import JaxSampler

    network, params, mesh = open_model(args)
    sampler = JaxSampler(
        network,
        banned_ids=processor.banned_ids,
        end_ids=processor.end_ids,
        patches_of=processor.patches,
        mesh=mesh,
        max_num_seqs=args.max_num_seqs,
    )
    sampler.load(params)
    yield sampler


@contextlib.contextmanager
def _open_vllm(args: argparse.Namespace, processor: Any) -> Iterator[Any]:
    """One vLLM engine on this machine. It gets its weights over the bridge, as in a run."""
    from lmmr1_jax.config.engine_arguments import VLLMS_RANGE, in_vllms_range
    from lmmr1_jax.config.schema import DataConfig, RolloutConfig, RunConfig, TrainConfig, VllmConfig
    from lmmr1_jax.rollout.engines.open import open_sampler as open_engines
    from lmmr1_jax.rollout.engines.ray_cluster import connected

    config = TrainConfig(
        run=RunConfig(seed=args.seed),
        data=DataConfig(max_pixels=args.max_pixels, max_prompt_tokens=args.max_prompt_tokens),
        rollout=RolloutConfig(sampler="vllm", max_new_tokens=args.max_new_tokens),
        vllm=VllmConfig(dtype=args.compute_dtype, max_num_seqs=args.max_num_seqs, max_images=args.max_images),
    )
    if args.temperature and not in_vllms_range(args.temperature):
        raise UserError(f"--temperature is {args.temperature:g}; with --sampler vllm it must be 0 or {VLLMS_RANGE}")
    with connected(config.ray, cpus=config.vllm.cpus):
        network, params, _ = open_model(args)
        with open_engines(config, processor, network, Path(args.model)) as sampler:
            sampler.load(params, version=0)
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
