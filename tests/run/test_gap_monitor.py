"""The gap between learner and sampler is warned of, then ends the run; thresholds of 0.02 and 0.2, by hand."""

import math
import re
import subprocess
import sys

import pytest
from whole_runs import ROOT, lines

from lmmr1_jax.run.gap_monitor import LogProbGapMonitor
from lmmr1_jax.runtime.errors import UserError


def test_a_small_gap_says_nothing_and_a_larger_one_warns():
    watch = LogProbGapMonitor(warn=0.02, stop=0.2)
    assert watch.observe(1, 0.02) is None
    assert "0.021" in watch.observe(2, 0.021)


@pytest.mark.parametrize("gap", [0.3, math.nan, math.inf])
def test_the_third_step_in_a_row_above_the_limit_ends_the_run(gap):
    watch = LogProbGapMonitor(warn=0.02, stop=0.2)
    assert watch.observe(1, gap) and watch.observe(2, gap)
    with pytest.raises(UserError, match="step 3.*rollout.gap_stop"):
        watch.observe(3, gap)


def test_one_good_step_starts_the_count_anew():
    watch = LogProbGapMonitor(warn=0.02, stop=0.2)
    for step in range(1, 10):
        watch.observe(step, 0.0 if step % 3 == 0 else 0.3)


def test_the_count_survives_a_resume():
    watch, resumed = LogProbGapMonitor(0.02, 0.2), LogProbGapMonitor(0.02, 0.2)
    watch.observe(1, 0.3), watch.observe(2, 0.3)
    resumed.load_state_dict(watch.state_dict())
    with pytest.raises(UserError):
        resumed.observe(3, 0.3)


STALE = """
import jax
from lmmr1_jax.runtime.cli import run_cli
from lmmr1_jax.rollout.local.sampler import JaxSampler
from lmmr1_jax.train import main

load, first = JaxSampler.load, []


def load_the_first_ones(self, params, version=0, **how):
    first.append(jax.tree.map(lambda leaf: leaf.copy(), params))
    load(self, first[0], version, **how)


JaxSampler.load = load_the_first_ones
run_cli(main)
"""


def test_a_run_whose_sampler_keeps_the_old_weights_and_calls_them_new_warns_and_ends(tmp_path):
    flags = (
        "--config configs/demo/rloo.py --run.steps 8 --rollout.prompts 4 --rollout.completions 4 --eval.size 0 "
        "--rollout.gap-warn 0.001 --rollout.gap-stop 0.002 --learner.learning-rate 1e-3 --learner.warmup-ratio 0"
    ).split()
    command = [sys.executable, "-c", STALE, *flags, "--run.dir", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert re.search("rollout.gap_stop=0.002.*--resume goes on", done.stderr.splitlines()[-1])
    assert "Traceback" not in done.stderr
    assert "log-probs differ" in done.stdout + done.stderr
    gaps = [record["gap/mean"] for record in lines(tmp_path / "run" / "metrics.jsonl")]
    assert gaps[0] < 1e-5 and all(gap > 0.002 for gap in gaps[-3:]) and len(gaps) < 8
