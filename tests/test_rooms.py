"""The walls of the house: what may import what, and how large a file may grow."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENTRY_POINTS = {"train", "generate", "score", "evaluate"}
LONGEST = 400


def test_the_import_contracts_of_pyproject_hold():
    pytest.importorskip("importlinter")
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    done = subprocess.run([*command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 broken" in done.stdout


def test_only_entry_points_stand_loose_in_the_package():
    loose = {path.stem for path in (ROOT / "lmmr1_jax").glob("*.py")}
    assert loose == ENTRY_POINTS | {"__init__"}


def test_no_file_has_more_lines_than_one_idea_needs():
    long = {
        str(path.relative_to(ROOT)): lines
        for package in ("lmmr1_jax", "weights_bridge")
        for path in (ROOT / package).rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > LONGEST
    }
    assert not long
