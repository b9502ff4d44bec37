"""Buckets on the engine's side: they may come in any order, and none outlives its update."""

import asyncio
import itertools
import time
from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("vllm")

import ray  # noqa: E402

from lmmr1_jax.rollout.engines.vllm.actor import EngineActor  # noqa: E402

KEPT = 20.0
"""Seconds in which the object store must have given everything back."""


@ray.remote(num_cpus=0)
class Pieces:
    """The receiver over a model that only keeps what it is given."""

    def whole(self, orders: list[tuple[int, ...]]) -> list[list[int]]:
        """The tensor that each order of its pieces makes."""
        import torch

        from weights_bridge.vllm.cpu_compat.cuda_builds import tolerate

        tolerate()
        from weights_bridge.vllm.receiver import HostUpdateInfo, HostWeightTransferEngine

        made = []
        for order in orders:
            receiver = object.__new__(HostWeightTransferEngine)
            receiver.model = SimpleNamespace(load_weights=lambda came: made.extend(t.tolist() for _, t in came))
            receiver._tensors = {"w": (torch.int32, [3, 2])}
            receiver._missing, receiver._parts, receiver._awaited = {"w"}, {}, {}
            pieces = np.arange(6, dtype=np.int32).view(np.uint8).reshape(3, 8)
            for number, place in enumerate(order, 1):
                receiver.receive_weights(HostUpdateInfo([("w", 8 * place)], [pieces[place]]))
                assert bool(receiver._missing) == (number < len(order))
        return made


def test_a_tensor_is_whole_in_whatever_order_its_pieces_come(cluster):
    orders = list(itertools.permutations(range(3)))
    made = ray.get(Pieces.remote().whole.remote(orders), timeout=120)
    assert made == [[[0, 1], [2, 3], [4, 5]]] * len(orders)


@ray.remote(num_cpus=0)
class Worker:
    def fetch(self, reference: bytes) -> int:
        (array,) = ray.get(ray.cloudpickle.loads(reference))
        return array.nbytes


class ApartFromItsWorker(EngineActor):
    """An actor whose engine's worker is a process of its own, with no vLLM in it."""

    def __init__(self, worker):
        def receive(info: dict) -> Future:
            assert info["ray_address"]
            return asyncio.run_coroutine_threadsafe(fetched(info["reference"]), asyncio.get_running_loop())

        async def fetched(reference: bytes) -> int:
            return await worker.fetch.remote(reference)

        self._apart, self._engine = True, SimpleNamespace(receive=receive)


def test_the_store_keeps_no_bucket_that_workers_of_their_own_have_taken(cluster):
    actor = ray.remote(ApartFromItsWorker).options(num_cpus=0, max_concurrency=8).remote(Worker.remote())
    bucket, before = 8 << 20, stored()
    for _ in range(4):
        reference = ray.put([np.ones(bucket, np.uint8)])
        ray.get(actor.receive.remote([("w", 0)], [reference]), timeout=60)
        del reference
    deadline = time.monotonic() + KEPT
    while stored() > before + bucket // 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert stored() <= before + bucket // 2
    ray.kill(actor)


def stored() -> int:
    """Bytes in the object store of this machine."""
    from ray._private.internal_api import node_stats

    (node,) = ray.nodes()
    return node_stats(node["NodeManagerAddress"], node["NodeManagerPort"]).store_stats.object_store_bytes_used
