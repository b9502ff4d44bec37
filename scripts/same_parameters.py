"""Trains the demos by this checkout and by another commit, and compares the parameters they end with, bit for bit.

    python scripts/same_parameters.py --commit 5bafa08 --folder /tmp/same [--presets rloo ppo dapo grpo] [--steps 20]

A refactoring that changes no arithmetic changes no bit. The other commit is checked out into a worktree in the folder;
its runs are kept there and used again. Compared are the policy's parameters and, with PPO, the critic's.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", required=True, help="to compare with")
    parser.add_argument("--folder", type=Path, required=True, help="for the worktree and the runs")
    parser.add_argument("--presets", nargs="+", default=["rloo", "ppo", "dapo", "grpo"], help="names of demos")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args(argv)
    folder, different = arguments.folder.absolute(), 0
    other = folder / arguments.commit
    if not other.exists():
        subprocess.run(["git", "worktree", "add", "--detach", other, arguments.commit], cwd=ROOT, check=True)
    for preset in arguments.presets:
        theirs = train(other, preset, folder / f"{preset}-{arguments.commit}-{arguments.steps}", arguments.steps)
        ours = train(ROOT, preset, folder / f"{preset}-{os.getpid()}", arguments.steps)
        fault = difference(parameters(ours), parameters(theirs))
        different += fault is not None
        print(f"{preset}: {fault or 'bit-equal'} after {arguments.steps} steps", flush=True)
    return 1 if different else 0


def train(checkout: Path, preset: str, run: Path, steps: int) -> Path:
    """A finished run of the preset by the code in `checkout`; one that is there already is taken as it is."""
    if (run / "summary.json").exists():
        return run
    configs = checkout / "configs"
    demo = configs / "demo" / f"{preset}.py"
    config = demo if demo.exists() else configs / f"{preset}.py"  # before the demos had a folder of their own
    command = [sys.executable, "-m", "lmmr1_jax.train", "--config", str(config), "--run.dir", str(run)]
    command += ["--run.steps", str(steps), "--eval.size", "64", "--tracking.tensorboard", "False"]
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return run


def parameters(run: Path) -> dict[str, np.ndarray]:
    """Policy's and critic's parameters of the newest checkpoint by their path."""
    import jax
    import orbax.checkpoint as ocp

    steps = [int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdecimal()]
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        state = reader.restore((run / "checkpoints" / str(max(steps)) / "state").absolute())
    leaves = jax.tree_util.tree_leaves_with_path(state)
    named = {"/".join(re.findall(r"'([^']+)'", jax.tree_util.keystr(path))): np.asarray(leaf) for path, leaf in leaves}
    return {name: leaf for name, leaf in named.items() if "params" in name.split("/")}


def difference(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> str | None:
    """The first thing that is not the same, or None."""
    if ours.keys() != theirs.keys():
        return f"other parameters: {sorted(ours.keys() ^ theirs.keys())[:4]}"
    unequal = [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()]
    return f"{len(unequal)} of {len(ours)} arrays differ, {unequal[0]} among them" if unequal else None


if __name__ == "__main__":
    sys.exit(main())
