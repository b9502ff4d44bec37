"""What a run does when a reward function or a reward server fails: before the first step, and within a step."""

import json
import socket
import subprocess
import textwrap
from pathlib import Path

import pytest
import whole_runs
from whole_runs import lines

SMALL = (
    "--config configs/demo/rloo.py --run.steps 2 --rollout.prompts 4 --rollout.completions 4 --eval.size 4 "
    "--eval.max-new-tokens 4 --tracking.tensorboard False"
).split()


def train(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    data = folder.parent / "counting.jsonl"
    rows = [{"message": [{"role": "user", "content": f"{i} and 1?"}], "answer": str(i + 1)} for i in range(40)]
    data.write_text("\n".join(map(json.dumps, rows)))
    return whole_runs.train(folder, *SMALL, "--data.path", str(data), *flags)


def test_a_function_that_fails_ends_the_run_with_a_checkpoint_to_resume_from(tmp_path):
    broken = tmp_path / "broken"
    function = tmp_path / "length.py"
    function.write_text(
        textwrap.dedent(
            f"""
            import os
            calls = 0

            def reward_func(queries, prompts, labels):
                global calls
                calls += 1
                if calls > 1 + 4 and os.path.exists({str(broken)!r}):  # one call on trial, four in step 1
                    raise OSError("the scale is broken")
                return [len(query) / 1000 for query in queries]
            """
        )
    )
    flags = ["--rewards.functions", f"{function}*0.5"]
    broken.touch()
    stopped = train(tmp_path / "run", *flags)
    assert stopped.returncode == 2, stopped.stderr
    (line,) = [line for line in stopped.stderr.splitlines() if line.startswith("error:")]
    assert str(function) in line and "raised OSError: the scale is broken in line 9" in line
    assert "--resume goes on from there" in stopped.stdout and "Traceback" not in stopped.stderr
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["1"]
    broken.unlink()
    resumed = train(tmp_path / "run", *flags, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in metrics] == [1, 2]
    for record in metrics:
        parts = record["reward/accuracy"] + 0.5 * record["reward/format"] + 0.5 * record["reward/length"]
        assert record["reward/mean"] == pytest.approx(parts) and record["reward/length"] > 0.1
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["evaluation"]["after"]["prompts"] == 4


def test_updates_that_are_left_out_are_said(tmp_path):
    function = tmp_path / "huge.py"
    function.write_text(
        "def reward_func(queries, prompts, labels):\n    return [1e308 * (-1) ** i for i, _ in enumerate(queries)]\n"
    )
    done = train(tmp_path / "run", "--rewards.functions", str(function))
    assert done.returncode == 0, done.stderr
    assert [record["skipped_updates"] for record in lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    warnings = [line for line in done.stdout.splitlines() if "left out" in line]
    assert warnings == [f"warning: step {step}: updates left out for gradients not finite: 1" for step in (1, 2)]


def test_a_server_that_is_gone_costs_its_completions_where_the_config_says_so(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/get_reward"
    flags = f"--rewards.urls {url} --rewards.url-tries 2 --rewards.url-wait 0.1 --rewards.on-error zero --run.steps 1"
    done = train(tmp_path / "run", *flags.split())
    assert done.returncode == 0, done.stderr
    (record,) = lines(tmp_path / "run" / "metrics.jsonl")
    assert record["reward/faults"] == 16 and record["reward/mean"] == 0
    assert "ConnectionRefusedError" in done.stdout + done.stderr
    stopped = train(tmp_path / "other", *flags.replace("zero", "stop").split())
    assert stopped.returncode == 2 and "ConnectionRefusedError" in stopped.stderr and stopped.stderr.count("\n") == 1
    assert not (tmp_path / "other" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--rewards.functions none.py", "none.py: there is no such file"),
        ("--rewards.verifier maths", "no verifier 'maths'; known are math, number, choice, text"),
        ("--rewards.verifiers geometry=number", "'geometry'; the data has counting"),
        ("--rewards.urls localhost", "'localhost' is no address"),
        ("--rewards.functions {file}", "cannot be loaded: ZeroDivisionError: division by zero in line 1"),
    ],
)
def test_rewards_that_cannot_be_meant_are_one_line_before_the_first_step(tmp_path, flags, words):
    (tmp_path / "mine.py").write_text("1 / 0")
    done = train(tmp_path / "run", *flags.format(file=tmp_path / "mine.py").split())
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
