"""A Ray cluster of several nodes on one machine, and what becomes of a fleet when nodes die. Run as a program, because
a process can be part of one cluster only; prints a line of JSON per case, which test_cluster.py looks at."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import time

import numpy as np
import ray
from ray.cluster_utils import Cluster
from small_engine import SmallEngine

from lmmr1_jax.config.schema import RayConfig
from lmmr1_jax.rollout.engines.fleet import Fleet, FleetSettings
from lmmr1_jax.rollout.engines.protocol import GroupRequest
from lmmr1_jax.rollout.engines.ray_cluster import connected, reserved
from lmmr1_jax.runtime.errors import SamplingFailed, UserError
from weights_bridge.stream import Piece, TensorSpec
from weights_bridge.transports.host import HostTransport

START_TIMEOUT = 3.0
NOTICED = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 6}


class ThreeBuckets:
    specs = tuple(TensorSpec(name, np.dtype(np.float32), (4,)) for name in "abc")

    def buckets(self):
        for spec in self.specs:
            yield [Piece(spec.name, 0, np.zeros(spec.nbytes, np.uint8))]


def tell(case: str, **what) -> None:
    print(json.dumps({"case": case, **what}), flush=True)


def refusal(bundle: dict, count: int, label: str = "") -> dict:
    started = time.monotonic()
    try:
        with reserved(bundle, count, label=label, timeout=2.0):
            return {"message": ""}
    except UserError as error:
        return {"message": str(error), "seconds": time.monotonic() - started}


def kill_node(node) -> None:
    """As if the power had gone: its raylet and everything below it."""
    import psutil

    raylet = node.all_processes["raylet"][0].process.pid
    for process in [*psutil.Process(raylet).children(recursive=True), psutil.Process(raylet)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def requests(count: int, tokens: int) -> list[GroupRequest]:
    ids = np.arange(3, dtype=np.int32)
    return [GroupRequest(f"p{time.monotonic_ns()}-{number}", ids, ids, (), 2, tokens) for number in range(count)]


def served(fleet: Fleet, asked, groups) -> bool:
    """Each group there once, in order, of one version."""
    texts = [[bytes(c.token_ids.astype(np.uint8)).decode() for c in group] for group in groups]
    versions = {int(v) for group in groups for c in group for v in c.policy_version}
    return texts == [[f"{r.name}/0", f"{r.name}/1"] for r in asked] and versions == {0}


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": NOTICED})
    nodes = [cluster.add_node(num_cpus=2, resources={"sampler": 1}, labels={"kind": "big"}) for _ in range(2)]
    with connected(RayConfig(address=cluster.address, timeout=60.0), cpus=0):
        tell("room", **refusal({"CPU": 2}, 2))
        tell("too many", **refusal({"CPU": 2}, 3))
        tell("too large for a node", **refusal({"CPU": 3}, 1))
        tell("no such resource", **refusal({"CPU": 1, "gpu-box": 0.001}, 1))
        tell("no such label", **refusal({"CPU": 1}, 1, "kind=small"))
        tell("label", **refusal({"CPU": 1}, 1, "kind=big"))
        with reserved({"CPU": 2, "sampler": 0.001}, 2, label="", timeout=20.0) as slots:
            tell("another run's", **refusal({"CPU": 2}, 1))
            said: list[str] = []

            def make_engine(slot: int, before: int):
                options = slots.options(slot) | {"max_concurrency": 1000}
                return ray.remote(SmallEngine).options(**options).remote()

            settings = FleetSettings(2, 4, 60.0, 60.0, 60.0, 3)
            fleet = Fleet(settings, make_engine, HostTransport(bucket_bytes=1), {}, log=said.append)
            with contextlib.closing(fleet):
                fleet.load(ThreeBuckets(), 0)
                wait_for(fleet, 2)
                # One of two nodes dies in the midst of its work.
                asked = requests(12, 300)
                handle = fleet.submit(asked)
                time.sleep(0.2)
                kill_node(nodes[0])
                groups = fleet.collect(handle)
                tell("a node dies", served=served(fleet, asked, groups), engines=len(fleet.infos), said=said[:])
                # A new one comes, and an engine on it.
                nodes.append(cluster.add_node(num_cpus=2, resources={"sampler": 1}, labels={"kind": "big"}))
                wait_for(fleet, 2)
                asked = requests(12, 20)
                tell("a node comes", served=served(fleet, asked, fleet.collect(fleet.submit(asked))))
                # An engine that is stopped leaves its room to the next one.
                os.kill(fleet.infos[0].pid, signal.SIGKILL)
                wait_for(fleet, 2)
                # None is left. Until here engines could take their time to come.
                fleet.dispatcher.settings = dataclasses.replace(settings, start_timeout=START_TIMEOUT)
                handle = fleet.submit(requests(12, 2000))
                for node in nodes[1:]:
                    kill_node(node)
                started = time.monotonic()
                try:
                    fleet.collect(handle)
                except SamplingFailed as error:
                    tell("no node is left", message=str(error), seconds=time.monotonic() - started)
    with contextlib.suppress(Exception):  # it waits for nodes that were killed
        cluster.shutdown()


def wait_for(fleet: Fleet, engines: int) -> None:
    deadline = time.monotonic() + 60
    while len(fleet.infos) < engines:
        fleet.collect(fleet.submit(requests(1, 1)))
        time.sleep(0.05)
        if time.monotonic() > deadline:
            raise TimeoutError(f"{len(fleet.infos)} of {engines} engines")


if __name__ == "__main__":
    main()
