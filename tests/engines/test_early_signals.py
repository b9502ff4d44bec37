"""A run that is told to end before it has samplers: it does so at once, with one line, and leaves nothing."""

import contextlib
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

pytest.importorskip("vllm")

from whole_runs import ROOT  # noqa: E402

SOON = 45.0  # Ray may take 30 to end a cluster that it has just begun


def begin(folder, *flags: str) -> subprocess.Popen:
    config = "configs/demo/rloo_vllm.py"
    command = [sys.executable, "-m", "lmmr1_jax.train", "--config", config, "--run.dir", str(folder)]
    return subprocess.Popen(
        [*command, *flags], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def assert_ends_at_once(run: subprocess.Popen, number: signal.Signals, folder) -> None:
    run.send_signal(number)
    try:
        output, _ = run.communicate(timeout=SOON)
    finally:
        run.kill()
    assert run.returncode == 143, output
    assert f"stopped by {number.name} before anything was done" in output and "Traceback" not in output
    assert not folder.exists()


def children(pid: int) -> set[str]:
    """Their names."""
    names = set()
    for child in psutil.Process(pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            names.add(child.name())
    return names


def test_ctrl_c_ends_the_waiting_for_a_cluster(tmp_path):
    with socket.socket() as bound:  # but does not listen
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        run = begin(tmp_path / "run", "--ray.address", address, "--ray.timeout", "300")
        deadline = time.monotonic() + 60
        while not (tmp_path / "run" / "skipped.jsonl").exists():  # the last thing that is opened before
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(1.0)
        assert_ends_at_once(run, signal.SIGINT, tmp_path / "run")


def test_sigterm_while_ray_starts_is_the_runs_and_ends_what_has_started(tmp_path):
    run = begin(tmp_path / "run")
    deadline = time.monotonic() + 120
    while not {"gcs_server", "raylet"} & children(run.pid):
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    started = psutil.Process(run.pid).children(recursive=True)
    assert_ends_at_once(run, signal.SIGTERM, tmp_path / "run")
    assert not psutil.wait_procs(started, timeout=SOON)[1]
