"""Trains over two hosts that share no code and no memory, and cuts the link between them.

    python scripts/two_hosts.py --sampler-python SAMPLER_VENV/bin/python --out runs/two_hosts

Needs root, iproute2 and util-linux. Each host is a set of namespaces: network (an end of a veth pair, an address),
mounts (its own /tmp/ray and /dev/shm; the sampler's sees neither this repository's packages nor the learner's Python),
host name and processes. The learner's runs scripts/ray_head.sh and lmmr1_jax.train, the sampler's
scripts/ray_sampler.sh in an environment without JAX (requirements-sampler.txt). The scenarios:

    plain        the link as fast as the kernel is
    limited      200 Mbit/s
    cut_rollout  the link is down for 10 s while an engine samples
    cut_sync     200 Mbit/s, a larger model, and the link is down for 10 s while its weights are sent
    cut_long     the link is down for 75 s while an engine samples: Ray gives the sampler's node up, and it joins anew

Everything is gone afterwards, also when the script fails or is interrupted; `kill -9` of the script ends the hosts'
processes, and the next start removes the networks that it left.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
TINY_MODEL = REPOSITORY / "lmmr1_jax" / "assets" / "tiny"
PREFIX = "lmmr1-"
ADDRESSES = {"learner": "10.99.77.1", "sampler": "10.99.77.2"}
PORT = 6379
MBIT = 200
CUT_STEP = 4
WIDE = 8192
"""Intermediate size of the larger model: 9.8 M parameters, 39 MB in float32, 1.6 s at 200 Mbit/s."""
WIDE_SETTINGS = ("--rollout.prompts", "8", "--eval.size", "128")


@dataclasses.dataclass(frozen=True)
class Scenario:
    """What happens to the link: its limit, in which phase of a step it is cut (`time/PHASE` tells afterwards), and for
    how long."""

    limited: bool = False
    cut: str = ""
    seconds: float = 10.0
    wide: bool = False


SCENARIOS = {
    "plain": Scenario(),
    "limited": Scenario(limited=True),
    "cut_rollout": Scenario(cut="rollout"),
    "cut_sync": Scenario(limited=True, cut="sync", wide=True),
    "cut_long": Scenario(cut="rollout", seconds=75.0),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sampler-python", type=Path, required=True, help="of an environment without JAX")
    parser.add_argument("--out", type=Path, default=Path("runs/two_hosts"), help="a folder per scenario goes here")
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for a scenario")
    parser.add_argument("settings", nargs="*", help="flags of lmmr1_jax.train, after --")
    arguments = parser.parse_args(argv)
    if os.geteuid() != 0:
        parser.error("network namespaces need root")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    _check_sampler(arguments.sampler_python.absolute())
    for name in arguments.scenarios:
        print(f"{name} ...", flush=True)
        run_scenario(name, arguments)
    print_table(_results(arguments.out))
    return 0


def run_scenario(name: str, arguments: argparse.Namespace) -> None:
    """One run; what is to be said of it is left in `OUT/NAME/result.json`.

    Raises:
      RuntimeError: the run failed, or the cut missed its phase.
    """
    scenario, out = SCENARIOS[name], (arguments.out / name).absolute()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    run, log = out / "run", out / "learner.log"
    settings = ["--run.dir", str(run), "--run.steps", str(arguments.steps), "--eval.size", "256"]
    settings += ["--ray.address", f"{ADDRESSES['learner']}:{PORT}", "--vllm.resource", "sampler"]
    model_bytes = 0
    if scenario.wide:
        model_bytes = widen(out / "model")
        settings += ["--model.path", str(out / "model"), *WIDE_SETTINGS]
    settings += arguments.settings
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(16)
    with contextlib.ExitStack() as stack:
        names = stack.enter_context(network(MBIT if scenario.limited else 0))
        python, sampler_python = Path(sys.executable), arguments.sampler_python.absolute()
        train = [python, "-m", "lmmr1_jax.train", "--config", REPOSITORY / "configs/demo/rloo_vllm.py", *settings]
        head = ["env", f"RAY={python.parent / 'ray'}", REPOSITORY / "scripts/ray_head.sh", ADDRESSES["learner"], PORT]
        sampler = [REPOSITORY / "scripts/ray_sampler.sh", f"{ADDRESSES['learner']}:{PORT}", "--num-cpus=2"]
        sampler = ["env", f"RAY={sampler_python.parent / 'ray'}", *sampler]
        hidden = [REPOSITORY / "lmmr1_jax", REPOSITORY / "weights_bridge", Path(sys.prefix)]
        begun = time.monotonic()
        learner = stack.enter_context(
            host("learner", names["learner"], out, [], f"{_shell(head)} >{out}/head.log 2>&1 & exec {_shell(train)}")
        )
        stack.enter_context(host("sampler", names["sampler"], out, hidden, f"exec {_shell(sampler)}"))
        cut_at = None
        while learner.poll() is None:
            if time.monotonic() - begun > arguments.timeout:
                raise RuntimeError(f"{name} did not end within {arguments.timeout:g} s; see {log}")
            steps = _lines(run / "metrics.jsonl")
            if scenario.cut and cut_at is None and len(steps) >= CUT_STEP:
                _wait_for(scenario.cut, steps[-1], names["learner"], model_bytes)
                cut_at = time.monotonic() - begun
                cut(names["sampler"], scenario.seconds)
            time.sleep(0.05)
        seconds = time.monotonic() - begun
    if learner.returncode:
        raise RuntimeError(f"{name} ended with status {learner.returncode}: {_tail(log)}")
    result = _result(name, scenario, out, seconds)
    (out / "result.json").write_text(json.dumps(result))


def _result(name: str, scenario: Scenario, out: Path, seconds: float) -> dict[str, object]:
    steps = _lines(out / "run" / "metrics.jsonl")
    summary = json.loads((out / "run" / "summary.json").read_text())
    longest = ""
    if scenario.cut:
        # The step that the cut fell in, by the phase it was aimed at.
        struck = max(steps[CUT_STEP - 1 : CUT_STEP + 2], key=lambda step: step[f"time/{scenario.cut}"])
        longest = f"{scenario.cut} of step {struck['step']} took {struck[f'time/{scenario.cut}']:.1f} s"
        if struck[f"time/{scenario.cut}"] < scenario.seconds:
            raise RuntimeError(f"{name}: the cut missed its phase: {longest}")
    return {
        "scenario": name,
        "steps": summary["steps"],
        "accuracy": round(summary["evaluation"]["after"]["accuracy"], 3),
        "gap/mean max": max(step["gap/mean"] for step in steps),
        "replaced": len(re.findall(r"vLLM engine \d+.* is replaced", (out / "learner.log").read_text())),
        "seconds": round(seconds, 1),
        "sync": round(summary["seconds"]["sync"], 2),
        "cut": longest,
    }


def print_table(rows: list[dict[str, object]]) -> None:
    """As Markdown."""
    print("| " + " | ".join(rows[0]) + " |\n|" + " --- |" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(f"{value:.1e}" if "gap" in key else str(value) for key, value in row.items()) + " |")


@contextlib.contextmanager
def network(mbit: int) -> Iterator[dict[str, str]]:
    """Two network namespaces joined by a veth pair; their names by host.

    Args:
      mbit: Mbit/s in each direction; 0 is no limit.
    """
    for stale in re.findall(rf"^{PREFIX}\S+", _ip("netns", "list"), re.MULTILINE):
        if not _ip("netns", "pids", stale).strip():
            _ip("netns", "delete", stale)
    names = {name: f"{PREFIX}{name}-{os.getpid()}" for name in ADDRESSES}
    try:
        for name in names.values():
            _ip("netns", "add", name)
        learner, sampler = names.values()
        _ip("-netns", learner, "link", "add", "veth", "type", "veth", "peer", "name", "veth", "netns", sampler)
        for host_name, name in names.items():
            _ip("-netns", name, "address", "add", f"{ADDRESSES[host_name]}/24", "dev", "veth")
            _ip("-netns", name, "link", "set", "lo", "up")
            _ip("-netns", name, "link", "set", "veth", "up")
            if mbit:
                limit = f"qdisc add dev veth root tbf rate {mbit}mbit burst 256kb latency 100ms"
                _run("tc", "-netns", name, *limit.split())
        yield names
    finally:
        for name in names.values():
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@contextlib.contextmanager
def host(name: str, net: str, out: Path, hidden: list[Path], command: str) -> Iterator[subprocess.Popen]:
    """Runs a shell command on a host of its own, in the empty folder `OUT/NAME`; ends it with all its children.

    Args:
      name: the host's.
      net: its network namespace.
      out: gets `NAME.log` and Ray's folder.
      hidden: folders that it does not see.
      command: for bash.
    """
    for folder in (out / name, Path("/tmp/ray"), ray := out / f"{name}-ray"):
        folder.mkdir(exist_ok=True)
    setup = [f"hostname {name}", f"mount --bind {ray} /tmp/ray", "mount -t tmpfs -o size=16g tmpfs /dev/shm"]
    setup += [f"mount -t tmpfs tmpfs {shlex.quote(str(folder))}" for folder in hidden]
    # A process namespace ends with its first process, and that one with us.
    command = " && ".join([*setup, f"cd {shlex.quote(str(out / name))} && {{ {command}; }}"])
    spaces = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
    with open(out / f"{name}.log", "wb") as log:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", net, *spaces, "bash", "-c", command],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": "" if hidden else str(REPOSITORY)},
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def cut(net: str, seconds: float) -> None:
    """Takes the link down and up again."""
    _ip("-netns", net, "link", "set", "veth", "down")
    try:
        time.sleep(seconds)
    finally:
        _ip("-netns", net, "link", "set", "veth", "up")


def _wait_for(phase: str, last: dict[str, float], net: str, model_bytes: int) -> None:
    """Until the next step is in the midst of the phase."""
    if phase == "rollout":
        time.sleep(0.4 * last["time/rollout"])
        return
    begun = _sent(net)
    while _sent(net) - begun < model_bytes / 4:
        time.sleep(0.02)


def widen(folder: Path) -> int:
    """The tiny model with a feed-forward part of size `WIDE`, computing the same: what is new is random and read out
    with zeros. Returns the bytes of its parameters in float32."""
    from safetensors.numpy import load_file, save_file

    folder.mkdir()
    config = json.loads((TINY_MODEL / "config.json").read_text())
    tensors = load_file(TINY_MODEL / "model.safetensors")
    rng = np.random.default_rng(0)
    for name, tensor in tensors.items():
        if "visual" in name or not (part := re.search(r"mlp\.(gate|up|down)_proj\.weight$", name)):
            continue
        axis = 1 if part[1] == "down" else 0
        shape = list(tensor.shape)
        shape[axis] = WIDE - shape[axis]
        new = rng.normal(0, 0.02, shape) if axis == 0 else np.zeros(shape)
        tensors[name] = np.concatenate([tensor, new.astype(tensor.dtype)], axis)
    for file in TINY_MODEL.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder)
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": WIDE}))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return sum(4 * tensor.size for tensor in tensors.values())


def _check_sampler(python: Path) -> None:
    """Its environment must hold vLLM and this package, and no JAX."""
    look = (
        "import importlib.util as u; "
        "print([m for m in ('vllm', 'ray', 'lmmr1_jax', 'weights_bridge') if not u.find_spec(m)], "
        "[m for m in ('jax', 'jaxlib', 'flax') if u.find_spec(m)])"
    )
    found = subprocess.run([python, "-c", look], capture_output=True, text=True, check=True, cwd="/").stdout.strip()
    if found != "[] []":
        sys.exit(f"error: --sampler-python {python}: missing and superfluous there are {found}")


def _results(out: Path) -> list[dict[str, object]]:
    """Results of this and earlier calls, in the order of the scenarios."""
    files = [out / name / "result.json" for name in SCENARIOS]
    return [json.loads(file.read_text()) for file in files if file.exists()]


def _sent(net: str) -> int:
    told = json.loads(_ip("-netns", net, "-json", "-statistics", "link", "show", "dev", "veth"))
    return told[0]["stats64"]["tx"]["bytes"]


def _lines(file: Path) -> list[dict[str, float]]:
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return " / ".join(lines[-3:])


def _shell(command: list[object]) -> str:
    return shlex.join(str(part) for part in command)


def _ip(*arguments: str) -> str:
    return _run("ip", *arguments)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}: {done.stderr.strip()}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
