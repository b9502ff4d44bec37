"""Buckets on the engine's side: they may come in any order."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("vllm")

import ray  # noqa: E402


@ray.remote(num_cpus=0)
class Pieces:
    """The receiver over a model that only keeps what it is given."""

    def whole(self, orders: list[tuple[int, ...]]) -> list[list[int]]:
        """The tensor that each order of its pieces makes."""
        import torch

        from weights_bridge.vllm.cuda_builds import tolerate

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
