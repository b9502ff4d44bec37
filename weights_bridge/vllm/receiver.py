"""The engine's side of the bridge: takes buckets of checkpoint tensors from host memory into vLLM's model.

Runs inside a vLLM worker, beside the model, and imports no JAX. One update is

    start_weight_update -> update_weights (once a bucket) -> finish_weight_update

and vLLM's layerwise reload lies under it: a layer's tensors are collected as they come and put in place when the
layer is whole, so a fused projection may arrive in parts and in any order.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from weights_bridge.vllm.private import begin_layerwise_reload, end_layerwise_reload

COMPARED_FIELDS = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "tie_word_embeddings")
"""Fields of config.json (its text model's) in which the two sides must agree."""


@dataclass
class HostInitInfo(WeightTransferInitInfo):
    """What the learner says of itself before the first update.

    Attributes:
      model: the learner's values of `COMPARED_FIELDS`.
      tensors: name -> [dtype, shape] of everything that each update will send.
    """

    model: dict[str, Any]
    tensors: dict[str, list[Any]]


@dataclass
class HostUpdateInfo(WeightTransferUpdateInfo):
    """One bucket.

    Attributes:
      places: of its pieces: the tensor's name as in the checkpoint, and the byte of it at which the piece begins.
      arrays: their bytes in the same order, uint8 arrays that may be read-only views of shared memory; or
      reference: the pickled Ray reference to that list, for a worker that is a process of its own.
      ray_address: of the cluster that the reference belongs to.
    """

    places: list[tuple[str, int]]
    arrays: list[Any] = field(default_factory=list)
    reference: bytes = b""
    ray_address: str = ""


class HostWeightTransferEngine(WeightTransferEngine[HostInitInfo, HostUpdateInfo]):
    """Loads what it is handed; counts what came, so that a model is never left half new."""

    init_info_cls = HostInitInfo
    update_info_cls = HostUpdateInfo

    def init_transfer_engine(self, init_info: HostInitInfo) -> None:
        """Compares the two models.

        Raises:
          ValueError: they differ in architecture, vocabulary or dtype; one line that names the field.
        """
        own = self.model_config.hf_config
        text = getattr(own, "text_config", own)
        for name in COMPARED_FIELDS:
            theirs = init_info.model.get(name)
            ours = own.model_type if name == "model_type" else getattr(text, name, getattr(own, name, None))
            if theirs is not None and ours != theirs:
                raise ValueError(f"the learner's {name} is {theirs!r}, the engine's model has {ours!r}")
        wanted = str(self.model_config.dtype).removeprefix("torch.")
        sent = sorted({dtype for dtype, _ in init_info.tensors.values()} - {wanted})
        if sent:
            raise ValueError(f"the learner sends {', '.join(sent)}, the engine's model computes in {wanted}")
        self._tensors = {name: (getattr(torch, dtype), shape) for name, (dtype, shape) in init_info.tensors.items()}

    def start_weight_update(self) -> None:
        """Opens an update."""
        self._missing = set(self._tensors)
        self._parts: dict[str, torch.Tensor] = {}
        self._awaited: dict[str, int] = {}
        begin_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Takes one bucket. (The base class would wait for an accelerator, which a CPU worker has not.)"""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            # The copies read memory that the learner may take back once this returns.
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: HostUpdateInfo) -> None:
        """Hands the bucket's tensors to the model.

        Raises:
          ValueError: a tensor that was not announced.
        """
        arrays = update_info.arrays or _fetch(update_info)
        unknown = [name for name, _ in update_info.places if name not in self._tensors]
        if unknown:
            raise ValueError(f"tensors that the learner did not announce: {unknown[:5]}")
        whole = [self._take(*place, _bytes(array)) for place, array in zip(update_info.places, arrays, strict=True)]
        came = [tensor for tensor in whole if tensor is not None]
        self.model.load_weights(came)
        self._missing.difference_update(name for name, _ in came)

    def _take(self, name: str, start: int, data: torch.Tensor) -> tuple[str, torch.Tensor] | None:
        """The tensor that a piece completes: over the piece's own memory where it is all of it.

        Pieces come in any order: buckets are fetched side by side, and over a network a small one overtakes.
        """
        dtype, shape = self._tensors[name]
        size = math.prod(shape) * dtype.itemsize
        if data.numel() < size:
            if name not in self._parts:
                self._parts[name] = torch.from_numpy(np.empty(size, np.uint8))  # in huge pages, unlike torch's
                self._awaited[name] = size
            self._parts[name][start : start + data.numel()] = data
            self._awaited[name] -= data.numel()
            if self._awaited[name]:
                return None
            data = self._parts.pop(name)
        return name, data.view(dtype).view(shape)

    def finish_weight_update(self) -> None:
        """Closes the update.

        Raises:
          RuntimeError: some tensors did not come. The model is then half new and must not be used.
        """
        if self._missing:
            raise RuntimeError(f"the update lacks {len(self._missing)} tensors, {sorted(self._missing)[:3]} among them")
        end_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Nothing is held between updates."""


def _bytes(array: Any) -> torch.Tensor:
    """The same memory as a tensor. It is only ever read, so that the array may be read-only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)


def _fetch(update_info: HostUpdateInfo) -> list[Any]:
    """The bucket from Ray's object store on this machine, without a copy."""
    import ray

    if not ray.is_initialized():
        ray.init(address=update_info.ray_address, log_to_driver=False, logging_level="error")
    # Ray's own pickle: a reference that is rebuilt from its id has no owner, and waits for ever.
    return ray.get(ray.cloudpickle.loads(update_info.reference))
