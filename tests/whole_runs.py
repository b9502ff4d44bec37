"""Programs run as a user would, in processes of their own: trainings, and tests' own programs on eight devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
ROOT = TESTS.parent


def train(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    """A run in `folder`, waited for."""
    command = [sys.executable, "-m", "lmmr1_jax.train", *flags, "--run.dir", str(folder)]
    # Of an entry that another test is just writing JAX says that it can't be read, and goes on.
    environment = os.environ | {"PYTHONWARNINGS": "ignore::UserWarning:jax._src.compiler"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def lines(path: Path) -> list[dict]:
    """The records of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def on_eight_devices(program: Path, flags: Sequence[str] = ()) -> Any:
    """What a program prints as its last line, JSON, where JAX sees eight CPUs."""
    environment = os.environ | {
        "XLA_FLAGS": " ".join(["--xla_force_host_platform_device_count=8", *flags]),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(TESTS)]),
    }
    done = subprocess.run([sys.executable, str(program)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])
