"""Times real optimisation steps whose completions all have exactly T tokens.

    python scripts/bench_step.py --model DIR --data FILE --prompts P --generations G --max-new-tokens T --steps N \
        --json OUT

A step is what a run does, phase by phase: rollout (preprocessing and sampling), score (a trivial reward, and the
passes for old and reference log-probs, of which this setting needs none), learn (the update), sync (the weights go
to the sampler). One update per rollout, no KL, AdamW, float32 on a CPU. The first step, which compiles, is left out;
figures are medians of the others. Peak memory is that of this process (VmHWM), counted anew from the second step on.

With `--sampler vllm` an engine beside the learner samples; with `--staleness N` it samples up to N batches ahead, and
`rollout` is what the learner still waits for them.

Beside the times stands a limit: the matrix products that a step cannot do without, over the rate at which XLA
multiplies square matrices, measured in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from lmmr1_jax.config.schema import (
    DataConfig,
    LearnerConfig,
    ModelConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
    VllmConfig,
)
from lmmr1_jax.config.validate import check
from lmmr1_jax.data.prompt_set import read_prompts
from lmmr1_jax.data.skips import SkipLog
from lmmr1_jax.models.vision_batch import slots_needed
from lmmr1_jax.rollout.rollout_queue import RolloutQueue
from lmmr1_jax.rollout.sampler_registry import SAMPLERS, check_sampler
from lmmr1_jax.run import setup
from lmmr1_jax.run.policy import PolicyModel, open_policy
from lmmr1_jax.run.step import Step
from lmmr1_jax.runtime.cli import run_cli
from lmmr1_jax.runtime.compilation import CompilationCounter
from lmmr1_jax.runtime.device_memory import release_memory
from lmmr1_jax.runtime.versions import versions
from lmmr1_jax.tracking.stopwatch import Stopwatch
from lmmr1_jax.types.records import Reward, Rollout

PHASES = ("rollout", "score", "learn", "sync")


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    config = TrainConfig(
        run=RunConfig(seed=arguments.seed),
        model=ModelConfig(path=arguments.model),
        data=DataConfig(path=arguments.data, shuffle=False),
        rollout=RolloutConfig(
            prompts=arguments.prompts,
            completions=arguments.generations,
            max_new_tokens=arguments.max_new_tokens,
            sampler=arguments.sampler,
            staleness=arguments.staleness,
        ),
        vllm=VllmConfig(cpus=arguments.engine_cpus, max_images=1) if arguments.sampler == "vllm" else VllmConfig(),
        learner=LearnerConfig(
            learning_rate=1e-6, remat=arguments.remat, logprob_chunk=arguments.logprob_chunk, rows=arguments.rows
        ),
    )
    check(config)
    check_sampler(config)
    with open_policy(config) as policy:
        result = measure(config, policy, arguments.steps)
    result["command"] = "python scripts/bench_step.py " + " ".join(sys.argv[1:] if argv is None else argv)
    Path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
    Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    seconds, limit = result["seconds_per_step"], result["limit"]
    print("median " + _line(seconds), f"peak {result['peak_memory_bytes'] / 2**20:.0f} MiB", sep="  ")
    print(f"limit at {limit['gemm_flops_per_second'] / 1e9:.0f} GFLOP/s: " + _line(limit["seconds"]))
    return 0


def measure(config: TrainConfig, policy: PolicyModel, steps: int) -> dict[str, Any]:
    """What goes into the JSON file, but for the command."""
    skips, wanted = SkipLog(), config.rollout
    prompts = read_prompts(config.data.path, skips=skips, special_tokens=policy.processor.special_tokens)
    learner = setup.build_learner(config, policy, total_updates=steps + 1)
    step = Step(config, policy, learner, trivial_reward, forced_length=True)
    state = learner.init_state(policy.load())
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    policy.sampler.load(state.params, 0)

    measured: list[dict[str, float]] = []
    compilations = CompilationCounter()
    with contextlib.closing(setup.build_prompt_loader(config, prompts, policy.processor, skips)) as loader:
        batches = RolloutQueue(
            loader, skips, step.begin, prompts=wanted.prompts, staleness=wanted.staleness, batches=steps + 1
        )
        for number in range(steps + 1):
            clock = Stopwatch()
            with clock("rollout"):
                rollouts = batches.next(number)
            with clock("score"):
                rollouts = step.score(rollouts)
                minibatches, _ = step.prepare(rollouts, state)
            with clock("learn"):
                state, metrics = step.update(state, minibatches)
            with clock("sync"):
                policy.sampler.load(state.params, number + 1)
                jax.block_until_ready(state.params)
            if any(len(c.token_ids) != wanted.max_new_tokens for rollout in rollouts for c in rollout.completions):
                raise RuntimeError("a completion has another length than was asked for")
            del minibatches
            print(f"{'first' if number == 0 else 'step ':5s} " + _line(clock.seconds), flush=True)
            if number == 0:
                compilations.restart()
                memory_is_fresh = forget_peak_memory()
            else:
                measured.append(clock.seconds)
    compiled = compilations.count  # the measurement of the limit compiles too

    seconds = {phase: statistics.median(step[phase] for step in measured) for phase in PHASES}
    seconds = {"total": statistics.median(sum(step.values()) for step in measured)} | seconds
    tokens = wanted.prompts * wanted.completions * wanted.max_new_tokens
    rate = gemm_rate()
    floor = needed_products(policy.network.config, rollouts)
    return {
        "seconds_per_step": seconds,
        "tokens_per_second": tokens / seconds["total"],
        # RolloutQueue of the learner, `rollout` is a wait and no measure of the sampler.
        "rollout_tokens_per_second": None if wanted.staleness else tokens / seconds["rollout"],
        "peak_memory_bytes": peak_memory(),
        "peak_memory_excludes_first_step": memory_is_fresh,
        "limit": {
            "gemm_flops_per_second": rate,
            "flops": floor,
            "seconds": {phase: flops / rate for phase, flops in floor.items()},
            "share_reached": {phase: flops / rate / seconds[phase] for phase, flops in floor.items()},
        },
        "compiled_programs": compiled,
        "steps": measured,
        "gap_mean": metrics["gap/mean"],
        "work": {
            "parameters": parameters,
            "prompts": wanted.prompts,
            "generations": wanted.completions,
            "max_new_tokens": wanted.max_new_tokens,
            "sampler": wanted.sampler,
            "staleness": wanted.staleness,
            "packed": dataclasses.asdict(step.shapes),
        },
        "versions": versions(),
        "devices": [str(device) for device in jax.devices()],
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--data", required=True, help="prompts in LMM-R1's format")
    parser.add_argument("--prompts", type=int, required=True, help="prompts per step")
    parser.add_argument("--generations", type=int, required=True, help="completions per prompt")
    parser.add_argument("--max-new-tokens", type=int, required=True, help="tokens of every completion")
    parser.add_argument("--steps", type=int, required=True, help="measured steps, beside the first")
    parser.add_argument("--json", required=True, help="where the figures go")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sampler", choices=tuple(SAMPLERS), default="jax")
    parser.add_argument("--staleness", type=int, default=0, help="batches that are sampled ahead; vllm alone")
    parser.add_argument("--engine-cpus", type=int, default=VllmConfig.cpus, help="threads of vLLM's engine on a CPU")
    defaults = LearnerConfig()
    parser.add_argument("--remat", choices=("none", "attention", "full"), default=defaults.remat)
    parser.add_argument("--logprob-chunk", type=int, default=defaults.logprob_chunk)
    parser.add_argument("--rows", type=int, default=defaults.rows, help="rows in a micro-batch")
    return parser.parse_args(argv)


def trivial_reward(rollouts: Sequence[Rollout], progress: object = None) -> list[Rollout]:
    """Free to compute, and different from completion to completion, so that advantages are not zero."""
    return [
        dataclasses.replace(r, rewards=tuple(Reward(float(c.token_ids.sum() % 97) / 96, {}) for c in r.completions))
        for r in rollouts
    ]


def needed_products(config: Any, rollouts: list[Rollout]) -> dict[str, float]:
    """Floating-point operations of the matrix products that no implementation can leave out, by phase.

    Every prompt and image is read once per pass, every completion token once; the head sees completion tokens
    alone; attention counts the pairs that see each other. The backward pass costs twice the forward pass, and
    nothing is computed twice.
    """
    text = config.text
    heads, kv_heads = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    layer = text.hidden_size * (2 * heads + 2 * kv_heads) + 3 * text.hidden_size * text.intermediate_size
    head = text.hidden_size * text.vocab_size
    language = images = 0.0
    for rollout in rollouts:
        prompt = len(rollout.encoded.token_ids)
        tokens, pairs = prompt, prompt * (prompt + 1) / 2
        for completion in rollout.completions:
            length = len(completion.token_ids)
            tokens += length
            pairs += length * prompt + length * (length + 1) / 2
            language += 2 * length * head
        language += text.num_layers * (2 * tokens * layer + 4 * pairs * heads)
        images += sum(_image_products(config.vision, image.grid_thw) for image in rollout.encoded.images)
    return {"rollout": language + images, "learn": 3 * (language + images)}


def _image_products(vision: Any, grid: tuple[int, int, int]) -> float:
    patches = grid[0] * grid[1] * grid[2]
    width, inner = vision.hidden_size, vision.intermediate_size
    mlp = (3 if vision.window_size else 2) * width * inner
    window = slots_needed(grid, vision) if not vision.window_size else vision.window_slots
    full = len(vision.full_attention_blocks) if vision.window_size else vision.depth
    attention = 4 * patches * width * (full * patches + (vision.depth - full) * min(window, patches))
    merged = patches // vision.spatial_merge_size**2
    merger_width = width * vision.spatial_merge_size**2
    merger = 2 * merged * merger_width * (merger_width + vision.out_hidden_size)
    return 2 * patches * (vision.patch_values * width + vision.depth * (4 * width * width + mlp)) + attention + merger


def gemm_rate(size: int = 2048, repeats: int = 7) -> float:
    """Floating-point operations per second of XLA's float32 product of two square matrices, the best of several."""
    matrix = jax.random.normal(jax.random.key(0), (size, size))
    multiply = jax.jit(lambda a: a @ a)
    multiply(matrix).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        multiply(matrix).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def forget_peak_memory() -> bool:
    """Starts the count of peak memory anew, without what compiling took; False where Linux does not allow it."""
    release_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory() -> int:
    """Bytes of resident memory at the peak (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def _line(seconds: dict[str, float]) -> str:
    return " ".join(f"{name}={value:.3f}" for name, value in seconds.items())


if __name__ == "__main__":
    run_cli(main)
