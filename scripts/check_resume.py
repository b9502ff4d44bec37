"""Kills runs at random moments with SIGKILL, resumes them, and compares every bit of what they end with.

    python scripts/check_resume.py --runs 10 --folder /tmp/check_resume [-- --algorithm.kl-coefficient 0.01 ...]

One run is left alone. Each of the others is killed at a random moment (while it starts, samples, learns, or writes a
checkpoint) and resumed. Parameters, Adam's moments, samples and what the metrics say of learning must be the same, bit
for bit. What stands behind `--` goes to every run.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

SETTINGS = (
    "--run.steps 6 --rollout.prompts 4 --rollout.completions 4 --rollout.max-new-tokens 24 "
    "--learner.learning-rate 1e-3 --checkpoint.every 2 --eval.size 8 --tracking.tensorboard False"
).split()
TIMED = ("time/", "tokens_per_second", "compiled_programs")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10, help="runs to kill and resume")
    parser.add_argument("--folder", type=Path, required=True, help="where the runs go; emptied first")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("settings", nargs="*", help="flags of lmmr1_jax.train, after --")
    arguments = parser.parse_args(argv)
    shutil.rmtree(arguments.folder, ignore_errors=True)
    arguments.folder.mkdir(parents=True)
    settings = [*SETTINGS, *arguments.settings]

    whole = arguments.folder / "whole"
    seconds = _run_to_the_end(whole, settings)
    print(f"an uninterrupted run took {seconds:.1f} s", flush=True)
    rng = random.Random(arguments.seed)
    different = 0
    for number in range(arguments.runs):
        folder = arguments.folder / f"killed-{number}"
        killed = _run_and_kill(folder, settings, rng, seconds, _count_lines(whole / "metrics.jsonl"))
        _run_to_the_end(folder, [*settings, "--resume"])
        faults = differences(whole, folder)
        different += bool(faults)
        print(f"run {number}: {killed}: {'; '.join(faults) or 'equal'}", flush=True)
    print(f"{arguments.runs - different} of {arguments.runs} runs ended bit-equal to the uninterrupted one")
    return 1 if different else 0


def differences(whole: Path, other: Path) -> list[str]:
    """What is not the same in two finished runs."""
    faults = []
    ours, theirs = _final_state(whole), _final_state(other)
    if ours.keys() != theirs.keys():
        faults.append("the checkpoints hold other arrays")
    else:
        unequal = [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()]
        if unequal:
            faults.append(f"{len(unequal)} of {len(ours)} arrays differ, {unequal[0]} among them")
    for name in ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl", "skipped.jsonl"):
        if _lines(whole / name) != _lines(other / name):
            faults.append(f"{name} differs")
    return faults


def _final_state(run: Path) -> dict[str, np.ndarray]:
    import jax
    import orbax.checkpoint as ocp

    steps = [int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdecimal()]
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        state = reader.restore((run / "checkpoints" / str(max(steps)) / "state").absolute())
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def _lines(path: Path) -> list[dict]:
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [
        {key: value for key, value in record.items() if not key.startswith(TIMED) and key != "seconds"}
        for record in records
    ]


def _start(folder: Path, settings: list[str]) -> subprocess.Popen:
    log = open(folder.with_suffix(".log"), "ab")
    command = [sys.executable, "-m", "lmmr1_jax.train", "--run.dir", str(folder), *settings]
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def _run_to_the_end(folder: Path, settings: list[str]) -> float:
    start = time.monotonic()
    status = _start(folder, settings).wait()
    if status:
        log = folder.with_suffix(".log").read_text()
        raise SystemExit(f"a run ended with status {status}:\n{log[-3000:]}")
    return time.monotonic() - start


def _run_and_kill(folder: Path, settings: list[str], rng: random.Random, seconds: float, steps: int) -> str:
    """Kills a fresh run at a random moment of a random step; in one of four runs while it starts."""
    process = _start(folder, settings)
    started = time.monotonic()
    metrics = folder / "metrics.jsonl"
    if rng.random() < 0.25:
        wait_until = lambda: time.monotonic() - started > moment  # noqa: E731
        moment = rng.uniform(0.0, 0.5) * seconds
    else:
        wait_until = lambda: _count_lines(metrics) >= step  # noqa: E731
        step = rng.randrange(steps)
    while process.poll() is None and not wait_until():
        time.sleep(0.005)
    time.sleep(rng.uniform(0.0, 0.5))
    process.send_signal(signal.SIGKILL)
    process.wait()
    return f"killed after {time.monotonic() - started:.1f} s with {_count_lines(metrics)} steps done"


def _count_lines(path: Path) -> int:
    return len(path.read_bytes().splitlines()) if path.exists() else 0


if __name__ == "__main__":
    sys.exit(main())
