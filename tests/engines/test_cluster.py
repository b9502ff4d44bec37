"""Whole runs and whole clusters: what is killed leaves nothing running and loses nothing, what can't be used is one
line and status 2."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

pytest.importorskip("vllm")

from lmmr1_jax.config.command_line import parse_train_config  # noqa: E402
from lmmr1_jax.data.skips import SkipLog  # noqa: E402
from lmmr1_jax.run.policy import assemble_policy
from lmmr1_jax.run.setup import build_prompt_loader, read_data  # noqa: E402

ROOT = Path(__file__).parents[2]
STEPS, PROMPTS, STALENESS = 16, 4, 2
SMALL = (
    f"--config configs/demo/rloo_vllm.py --run.steps {STEPS} --rollout.prompts {PROMPTS} --rollout.completions 2 "
    f"--rollout.max-new-tokens 32 --rollout.staleness {STALENESS} --eval.size 2 --checkpoint.every 2 "
    f"--tracking.samples {PROMPTS} --tracking.tensorboard False --vllm.cpus 1 --vllm.max-num-seqs 16 "
    "--vllm.kv-cache-gib 0.125"
).split()
SOON = 20.0
"""Seconds within which nothing of a run that was killed may be left."""


class Run:
    """A run in a session of its own, whose processes are known by a mark in their environment."""

    def __init__(self, folder: Path, *flags: str):
        self.folder, self.mark = folder, f"run-{uuid.uuid4().hex}"
        self._before = self._written()
        command = [sys.executable, "-m", "lmmr1_jax.train", *SMALL, "--run.dir", str(folder), *flags]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"LMMR1_TEST_MARK": self.mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def await_steps(self, count: int) -> None:
        deadline = time.monotonic() + 200
        while self._written() == self._before or len(lines(self.folder / "metrics.jsonl")) < count:
            assert self.process.poll() is None, self.process.stdout.read()[-3000:]
            assert time.monotonic() < deadline, "no step came"
            time.sleep(0.02)

    def _written(self) -> int:
        """When metrics were last written: what a run before this one left does not count."""
        path = self.folder / "metrics.jsonl"
        return path.stat().st_mtime_ns if path.exists() else 0

    def addresses(self) -> set[str]:
        """Where its processes listen."""
        found = set()
        for process in self.left():
            with contextlib.suppress(psutil.Error):
                found |= {c.laddr.ip for c in process.net_connections("tcp") if c.status == "LISTEN"}
        return found

    def left(self) -> list[psutil.Process]:
        """What runs of it, whoever its parent is by now."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("LMMR1_TEST_MARK") == self.mark and process.status() != "zombie":
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def engines(self) -> list[psutil.Process]:
        return [process for process in self.left() if "EngineActor" in "".join(process.cmdline()[:1])]

    def assert_nothing_left(self, seconds: float = SOON) -> None:
        deadline = time.monotonic() + seconds
        while (left := self.left()) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not left, left

    def end(self, timeout: float) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=timeout)
        return self.process.returncode, output


@pytest.fixture
def start(tmp_path):
    """Starts runs in one folder; what a failed test left of them ends with it."""
    runs = []

    def start(*flags: str) -> Run:
        runs.append(Run(tmp_path / "run", *flags))
        return runs[-1]

    yield start
    for run in runs:
        for process in run.left():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_run_that_is_killed_robbed_and_interrupted_goes_on_as_if_it_had_not_been(start):
    killed = start()
    folder = killed.folder
    killed.await_steps(3)
    addresses = killed.addresses()
    assert addresses and addresses <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    killed.process.kill()
    killed.process.wait()
    killed.assert_nothing_left()

    # Its only engine is gone, and there shall be no other.
    robbed = start("--resume", "--vllm.restarts", "0")
    robbed.await_steps(6)
    for engine in robbed.engines():
        engine.kill()
    status, output = robbed.end(60)
    assert status == 2 and "error: no vLLM engine is left: its process died" in output and "Traceback" not in output
    robbed.assert_nothing_left()
    assert (folder / "checkpoints" / str(len(lines(folder / "metrics.jsonl")))).is_dir()

    # Ctrl-C goes to all processes of a terminal, and comes when the only engine does not answer.
    interrupted = start("--resume")
    interrupted.await_steps(9)
    for engine in interrupted.engines():
        engine.suspend()
    os.killpg(interrupted.process.pid, signal.SIGINT)
    asked = time.monotonic()
    status, output = interrupted.end(60)
    assert status == 143 and time.monotonic() - asked < SOON, output
    assert "stopped by SIGINT" in output and "Traceback" not in output
    interrupted.assert_nothing_left()
    done = len(lines(folder / "metrics.jsonl"))
    assert (folder / "checkpoints" / str(done)).is_dir()

    status, output = start("--resume").end(200)
    assert status == 0 and "Traceback" not in output, output
    records = lines(folder / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    # The first step after a resume is sampled by the weights that were resumed, and by no others.
    assert [records[done]["off_policy_steps/mean"], records[done]["off_policy_steps/max"]] == [0, 0]
    off_policy = [(record["off_policy_steps/mean"], record["off_policy_steps/max"]) for record in records]
    assert all(0 <= mean <= most <= STALENESS for mean, most in off_policy)
    assert all(record.get("gap/max", 0) < 1e-3 for record in records)  # not measured where it was interrupted
    assert sum("gap/max" in record for record in records) >= STEPS - 2
    seen = [sample["prompt_id"] for sample in lines(folder / "samples.jsonl")]
    assert seen == prompts_of_an_uninterrupted_run(folder)


def prompts_of_an_uninterrupted_run(folder: Path) -> list[str]:
    config = parse_train_config([*SMALL, "--run.dir", str(folder)])
    policy = assemble_policy(config)
    prompts, _ = read_data(config, policy.processor, None, SkipLog())
    loader = build_prompt_loader(config, prompts, policy.processor, SkipLog())
    taken = [encoded.prompt.prompt_id for encoded in loader.take(STEPS * PROMPTS)]
    loader.close()
    return taken


def test_engines_of_several_processes_end_with_a_learner_that_is_killed(start):
    run = start("--vllm.tensor-parallel", "2")
    run.await_steps(1)
    engine = run.engines()[0]
    assert len(engine.children(recursive=True)) >= 2
    run.process.kill()
    run.process.wait()
    run.assert_nothing_left()


@pytest.fixture(scope="module")
def nodes() -> dict[str, dict]:
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    environment = os.environ | {"PYTHONPATH": path, "RAY_worker_niceness": "0"}
    command = [sys.executable, str(ROOT / "tests" / "cluster_cases.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    cases = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert cases, done.stderr[-3000:]
    return {case["case"]: case for case in cases}


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("too many", "it can hold 2"),
        ("too large for a node", "needs 3 CPU on one node, the most that a node has is 2"),
        ("no such resource", "0.001 gpu-box on one node"),
        ("no such label", "no node is labelled kind=small"),
        ("another run's", "another run holds it; free are 0 of 4 CPU"),
    ],
)
def test_engines_that_find_no_room_are_refused_in_time(nodes, case, words):
    assert words in nodes[case]["message"] and nodes[case]["seconds"] < 10
    assert not nodes["room"]["message"] and not nodes["label"]["message"]


def test_a_node_that_dies_takes_no_group_with_it_and_one_that_comes_is_used(nodes):
    assert nodes["a node dies"]["served"] and nodes["a node dies"]["engines"] == 1
    assert nodes["a node comes"]["served"]
    assert "vllm.start_timeout" in nodes["no node is left"]["message"]
    assert nodes["no node is left"]["seconds"] < 60


@pytest.fixture
def silent():
    """An address that takes connections and says nothing."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(5)
        yield f"127.0.0.1:{server.getsockname()[1]}"


WITHOUT = "import sys; sys.modules[{!r}] = None; sys.argv[0] = 'train'; import runpy; " + (
    "runpy.run_module('lmmr1_jax.train', run_name='__main__', alter_sys=True)"
)


@pytest.mark.parametrize(
    ("missing", "flags", "words"),
    [
        ("ray", [], "needs Ray, which is not installed"),
        ("vllm", [], "needs vLLM, which is not installed"),
        ("", ["--ray.address", "SILENT", "--ray.timeout", "3"], "does not answer as a Ray cluster"),
        ("", ["--ray.address", "127.0.0.1:1", "--ray.timeout", "1"], "does not answer"),
        ("", ["--ray.address", "ray://host:1"], "must be HOST:PORT"),
    ],
)
def test_a_cluster_that_cannot_be_used_is_one_line_and_status_2(tmp_path, silent, missing, flags, words):
    flags = [silent if flag == "SILENT" else flag for flag in flags]
    command = [sys.executable, "-m", "lmmr1_jax.train"] if not missing else [sys.executable, "-c"]
    command += [WITHOUT.format(missing)] if missing else []
    command += [*SMALL, "--run.dir", str(tmp_path / "run"), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and words in done.stderr
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())
