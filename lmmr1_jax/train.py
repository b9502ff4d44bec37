"""python -m lmmr1_jax.train --config configs/rloo.py

Parses, sets the environment, and hands over to `run/loop.py`, which tells the story of a run.
"""

from __future__ import annotations

import sys
from pathlib import Path

from lmmr1_jax.config.command_line import parse_train_config
from lmmr1_jax.rollout.sampler_registry import check_sampler
from lmmr1_jax.runtime.cli import run_cli
from lmmr1_jax.runtime.device_memory import reserve_device_memory
from lmmr1_jax.runtime.stop_signal import StopRequested, StopSignal


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0, or 143 after a signal that ended the run resumably."""
    config = parse_train_config(sys.argv[1:] if argv is None else argv, prog="python -m lmmr1_jax.train")
    check_sampler(config)
    try:
        with StopSignal() as stop:  # first: a Ctrl-C while JAX is imported is easily lost
            reserve_device_memory(config.vllm.colocate, config.vllm.gpu_memory_utilization)
            # The package's only late import: a mistyped flag is answered at once, and JAX finds its share of the GPU.
            from lmmr1_jax.run.loop import train

            summary = train(config, stop)
    except StopRequested as reason:
        if not Path(config.run.dir).exists():
            print(f"stopped by {reason} before anything was done")
        return 143
    before, after = (summary["evaluation"][when] for when in ("before", "after"))
    if before and after:
        print(
            f"greedy accuracy on {after['prompts']} held-out prompts: {before['accuracy']:.3f} before, "
            f"{after['accuracy']:.3f} after {summary['steps']} steps; the figures are in {config.run.dir}/summary.json"
        )
    return 0


if __name__ == "__main__":
    run_cli(main)
