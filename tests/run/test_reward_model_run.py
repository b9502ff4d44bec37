"""A run whose reward is partly a reward model's: it trains, logs the score, and goes on bit for bit."""

import json
import shutil
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_reward_model
import whole_runs
from whole_runs import lines

SMALL = (
    "--config configs/demo/rloo.py --run.steps 2 --rollout.prompts 4 --rollout.completions 4 --eval.size 8 "
    "--checkpoint.every 1 --tracking.tensorboard False"
).split()


def train(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    return whole_runs.train(folder, *SMALL, *flags)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_reward_model.write(tmp_path_factory.mktemp("models") / "random")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    done = train(folder, "--rewards.models", f"helpful={model}*0.5")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_the_score_is_a_metric_and_its_weighted_part_of_the_reward(finished):
    records = lines(finished / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2]
    for record in records:
        parts = record["reward/accuracy"] + 0.5 * record["reward/format"] + 0.5 * record["reward/helpful"]
        assert record["reward/mean"] == pytest.approx(parts, abs=1e-6)
        assert record["reward/faults"] == 0 and record["grad_norm"] > 0
    assert records[0]["reward/helpful"] != records[1]["reward/helpful"]
    completions = lines(finished / "samples.jsonl")[0]["completions"]
    assert len({completion["parts"]["helpful"] for completion in completions}) > 1
    assert json.loads((finished / "summary.json").read_text())["compiled_programs"] == 0


def test_a_run_with_a_reward_model_resumes_bit_for_bit(finished, model, tmp_path):
    from weights_bridge.run_checkpoint import read_orbax_params

    killed = tmp_path / "killed"
    shutil.copytree(finished, killed)
    shutil.rmtree(killed / "checkpoints" / "2")
    (killed / "summary.json").unlink()
    done = train(killed, "--rewards.models", f"helpful={model}*0.5", "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    same = ("reward/helpful", "reward/mean", "loss/policy", "grad_norm")
    before, after = (lines(folder / "metrics.jsonl")[1] for folder in (finished, killed))
    assert [after[name] for name in same] == [before[name] for name in same]
    ours, theirs = (read_orbax_params(folder / "checkpoints" / "2") for folder in (killed, finished))
    assert jax.tree.all(jax.tree.map(np.array_equal, ours, theirs))


def test_a_reward_model_of_another_tokenizer_ends_the_run_before_its_first_step_in_one_line(tmp_path):
    other = tiny_reward_model.write(tmp_path / "other")
    path = other / "tokenizer.json"
    path.write_text(path.read_text().replace("<|quad_start|>", "<|quad_begin|>"))
    (other / "tokenizer_config.json").unlink()
    done = train(tmp_path / "run", "--rewards.models", str(other))
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"error: rewards.models: {other}: its tokenizer is another than the policy's")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
