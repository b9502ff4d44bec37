"""A whole run of the embedded default, small: what it leaves, what it refuses, how it stops and goes on."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import whole_runs
from safetensors import safe_open
from whole_runs import ROOT, lines

SMALL = (
    "--config configs/demo/rloo.py --run.steps 3 --rollout.prompts 4 --rollout.completions 4 --eval.size 8 "
    "--checkpoint.every 2"
).split()


def train(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    return whole_runs.train(folder, *SMALL, *flags)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "small"
    done = train(folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_a_run_leaves_its_folder_whole(finished):
    for name in ("config.json", "metrics.jsonl", "samples.jsonl", "skipped.jsonl", "summary.json", "tb"):
        assert (finished / name).exists(), name
    assert sorted(int(p.name) for p in (finished / "checkpoints").iterdir()) == [2, 3]
    assert (finished / "model" / "config.json").exists()
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["steps"] == 3
    assert summary["evaluation"]["before"]["prompts"] == summary["evaluation"]["after"]["prompts"] == 8
    assert set(summary["seconds"]) >= {"total", "rollout", "score", "learn", "sync", "evaluate"}


def test_every_metric_of_a_run_stands_in_the_docs_table(finished):
    documented = set(re.findall(r"`([a-z_]+(?:/[a-z_]+)?)`", (ROOT / "docs" / "metrics.md").read_text()))
    for record in lines(finished / "metrics.jsonl"):
        assert set(record) <= documented, set(record) - documented
    wanted = (
        "step reward/mean reward/accuracy reward/format completion/length completion/truncated loss/policy "
        "grad_norm learning_rate gap/mean gap/max tokens_per_second time/rollout time/score time/learn time/sync "
        "compiled_programs skipped"
    ).split()
    assert set(wanted) <= set(record) and "kl" not in record  # there is no reference


def test_no_program_is_compiled_after_the_first_step(finished):
    assert json.loads((finished / "summary.json").read_text())["compiled_programs"] == 0


def test_sampler_and_learner_agree_in_every_step(finished):
    assert all(record["gap/max"] < 1e-3 for record in lines(finished / "metrics.jsonl"))


def test_samples_hold_prompts_completions_and_reward_parts(finished):
    sample = lines(finished / "samples.jsonl")[0]
    assert sample["step"] == 1 and len(sample["completions"]) == 4
    assert {"accuracy", "format"} <= set(sample["completions"][0]["parts"])


def test_a_run_exports_to_a_hugging_face_folder_with_other_weights_than_it_started_from(finished, tmp_path):
    from weights_bridge.load import load

    out = tmp_path / "exported"
    command = [sys.executable, "-m", "weights_bridge.export", "--checkpoint", str(finished), "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    before, after = load(ROOT / "lmmr1_jax" / "assets" / "tiny"), load(out)
    moved = np.abs(before["language"]["norm"]["scale"] - after["language"]["norm"]["scale"]).max()
    assert 0 < moved < 0.1


@pytest.mark.parametrize("backbone", ["own", "shared"])
def test_a_run_with_a_critic_names_its_metrics_and_exports_the_policy_alone(tmp_path, backbone):
    flags = ("--algorithm.name", "ppo", "--critic.backbone", backbone, "--run.steps", "2", "--eval.size", "2")
    done = train(tmp_path / "run", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    documented = set(re.findall(r"`([a-z_]+(?:/[a-z_]+)?)`", (ROOT / "docs" / "metrics.md").read_text()))
    for record in lines(tmp_path / "run" / "metrics.jsonl"):
        assert set(record) <= documented, set(record) - documented
    command = [sys.executable, "-m", "weights_bridge.export", "--checkpoint", str(tmp_path / "run")]
    out = tmp_path / "exported"
    done = subprocess.run([*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"wrote {out}\n", "")
    with safe_open(out / "model.safetensors", "np") as ours:
        with safe_open(ROOT / "lmmr1_jax" / "assets" / "tiny" / "model.safetensors", "np") as theirs:
            assert set(ours.keys()) == set(theirs.keys())


def test_a_folder_in_use_is_refused_in_one_line(finished):
    done = train(finished)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1 and "--resume" in done.stderr


def test_a_finished_run_resumes_to_the_same_summary(finished):
    before = json.loads((finished / "summary.json").read_text())
    done = train(finished, "--resume")
    assert done.returncode == 0, done.stderr[-2000:]
    after = json.loads((finished / "summary.json").read_text())
    assert after["steps"] == before["steps"]
    for when in ("before", "after"):
        assert after["evaluation"][when]["accuracy"] == before["evaluation"][when]["accuracy"]


def test_a_refused_resumption_leaves_the_run_as_it_was(finished):
    described = ("config.json", "model/config.json", "metrics.jsonl", "summary.json")
    before = {name: (finished / name).read_bytes() for name in described}
    done = train(finished, "--resume", "--run.steps", "4", "--model.freeze-vision")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert {name: (finished / name).read_bytes() for name in described} == before


def test_held_out_prompts_that_are_all_unusable_give_no_figures(tmp_path):
    long = {"message": [{"role": "user", "content": "count " * 3000}], "answer": "3"}
    (tmp_path / "long.jsonl").write_text(json.dumps(long) + "\n")
    done = train(tmp_path / "run", "--eval.path", str(tmp_path / "long.jsonl"), "--run.steps", "1")
    assert done.returncode == 0 and not done.stderr, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["evaluation"] == {"before": None, "after": None}
    assert summary["skipped"] == 1


def test_ctrl_c_is_heard_while_jax_is_imported(tmp_path):
    command = [sys.executable, "-m", "lmmr1_jax.train", *SMALL, "--run.steps", "300", "--run.dir", str(tmp_path / "r")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 60
    while "jaxlib" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert output.splitlines() == ["stopped by SIGINT before anything was done"]


def test_sigterm_writes_a_checkpoint_and_the_run_goes_on_from_it(tmp_path):
    folder = tmp_path / "stopped"
    settings = ["--run.steps", "300", "--checkpoint.every", "1000", "--eval.size", "4"]
    command = [sys.executable, "-m", "lmmr1_jax.train", *SMALL, "--run.dir", str(folder), *settings]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 2) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()[-3000:]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    done = [int(path.name) for path in (folder / "checkpoints").iterdir()]
    assert len(done) == 1 and done[0] == len(lines(metrics))
    # With as many steps as were done, the run has nothing left but its end.
    ended = train(folder, "--resume", *settings, "--run.steps", str(done[0] + 1))
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert [record["step"] for record in lines(metrics)] == list(range(1, done[0] + 2))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--model.path", "no/such/model"], "no/such/model"),
        (["--data.path", "no/such/data.jsonl"], "no/such/data.jsonl"),
        (["--learner.learnin-rate", "1"], "--learner.learnin-rate"),
        (["--learner.learning-rate", "fast"], "--learner.learning-rate"),
        (["--algorithm.reward-clip", "3"], "reward_clip"),
        (["--critic.learning-rate", "1e-4"], "critic.learning_rate"),
        (["--algorithm.name", "ppo", "--critic.path", "no/such/critic"], "no/such/critic"),
        (["--algorithm.name", "ppo", "--critic.freezing-actor-steps", "3"], "critic.freezing_actor_steps"),
        (["--rollout.completions", "1"], "rollout.completions"),
        (["--mesh.tensor", "64"], "mesh"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(tmp_path, flags, named):
    done = train(tmp_path / "refused", *flags)
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.strip() and "[transformers]" not in line]
    assert len(errors) == 1 and named in errors[0]


# A coefficient of the KL that adapts, more than one update a step, and further prompts within one.
ADAPTIVE = "--algorithm.name dapo --algorithm.kl-coefficient 0.1 --algorithm.kl-target 1e-3 --algorithm.kl-horizon 50"


# Two models that are trained, the second alone at first; or one with two heads and two updates a step.
OWN = "--algorithm.name ppo --critic.learning-rate 1e-3 --critic.freezing-actor-steps 2 --critic.freeze-vision"
SHARED = "--algorithm.name ppo --critic.backbone shared --critic.learning-rate 1e-3 --learner.minibatches 2"


@pytest.mark.parametrize(
    "flags, runs",
    [("", 2), (f"{ADAPTIVE} --learner.minibatches 2", 1), (OWN, 1), (SHARED, 1)],
    ids=["plain", "adaptive", "own critic", "shared critic"],
)
def test_killed_runs_end_bit_equal_to_an_uninterrupted_one(tmp_path, flags, runs):
    command = [sys.executable, "scripts/check_resume.py", "--runs", str(runs), "--folder", str(tmp_path / "runs")]
    command += ["--", *flags.split()] if flags else []
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{runs} of {runs} runs ended bit-equal" in done.stdout
    records = lines(tmp_path / "runs" / "whole" / "metrics.jsonl")
    if ADAPTIVE in flags:
        assert len({record["kl_coefficient"] for record in records}) > 1
        assert max(record["dynamic/rounds"] for record in records) > 0
    if "ppo" in flags:
        assert all(record["value/grad_norm"] > 0 for record in records)
        assert [record["learning_rate"] == 0 for record in records[:3]] == [flags == OWN] * 2 + [False]
