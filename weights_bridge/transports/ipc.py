"""The learner's side of the `ipc` transport: learner and engine on the same GPU, through memory that both have open.

The other side is vLLM's own `IPCWeightTransferEngine` (backend "ipc"). JAX's memory cannot be opened by another
process, so tensors are packed into one buffer of torch's, which the engines open once an update by CUDA's handle for
it; a bucket is overwritten when every engine has taken it. Needs a torch with CUDA beside JAX.

This file was written from vLLM 0.32's source and checked against its classes as far as a machine without a GPU allows
(the packing, what engines are told). The transfer itself has not been run yet.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import torch

from weights_bridge.errors import TransportError
from weights_bridge.stream import TensorSpec, TensorStream, split
from weights_bridge.torch_view import as_tensor
from weights_bridge.transports.host import failure_of

INIT_INFO = {"packed": True}
"""What vLLM's `init_weight_transfer_engine` must be told."""


class IpcTransport:
    """Sends a stream of tensors into engines on the learner's GPU.

    It takes one bucket of the GPU's memory, a bucket being the setting or the largest tensor, and that tensor once.

    Attributes:
      name: for the log.
      backend: the weight-transfer engine that vLLM must be told to use.
      owns_init: `send` initialises the engines; nobody else need.
    """

    name = "ipc"
    backend = "ipc"
    owns_init = True

    def __init__(
        self,
        *,
        bucket_bytes: int = 256 << 20,
        timeout: float = 600.0,
        check: Callable[[], None] = lambda: None,
    ):
        """
        Args:
          bucket_bytes: memory that a bucket may take.
          timeout: seconds after which an engine that does not take its bucket counts as lost.
          check: called again and again while engines are waited for; what it raises ends the sending.

        Raises:
          TransportError: JAX or torch is not on an NVIDIA GPU.
        """
        if jax.default_backend() != "gpu":
            raise TransportError(f"the ipc transport needs a learner on an NVIDIA GPU, JAX has {jax.default_backend()}")
        if not torch.cuda.is_available():
            raise TransportError("the ipc transport needs a torch with CUDA beside JAX; this one finds no GPU")
        self._bucket_bytes, self._timeout, self._check = bucket_bytes, timeout, check
        self._device = torch.device("cuda", jax.local_devices()[0].local_hardware_id)
        self._uuid = str(torch.cuda.get_device_properties(self._device).uuid)
        self._known: list[Any] = []

    @property
    def stream_bytes(self) -> int:
        """What a stream's `bucket_bytes` must be; its buckets are not used."""
        return self._bucket_bytes

    def send(self, stream: TensorStream, engines: Sequence[Any]) -> dict[int, BaseException]:
        """Every tensor to every engine, which must have begun an update.

        Args:
          stream: the tensors.
          engines: Ray handles with the methods `initialise(init_info)` and `update(update_info)`.

        Returns:
          The engines, by their place in `engines`, that did not take everything, and why. The others have it all.
        """
        from torch.multiprocessing.reductions import reduce_tensor

        known = {id(engine) for engine in self._known}
        lost = self._settle(
            {place: e.initialise.remote(INIT_INFO) for place, e in enumerate(engines) if id(e) not in known}
        )
        self._known = list(engines)
        room = max(self._bucket_bytes, *(spec.nbytes for spec in stream.specs))
        buffer = torch.empty(room, dtype=torch.uint8, device=self._device)
        _, handle = reduce_tensor(buffer)
        for specs in fill(buffer, stream, room):
            torch.cuda.synchronize(self._device)
            info = update_info(specs, {self._uuid: handle})
            lost |= self._settle(
                {place: e.update.remote(info) for place, e in enumerate(engines) if place not in lost}
            )
        del buffer
        # Gives back what the engines have closed; without it a buffer stays behind at every update.
        torch.cuda.ipc_collect()
        return lost

    def _settle(self, calls: dict[int, Any]) -> dict[int, BaseException]:
        """Waits for Ray calls; those that failed, by the place of their engine."""
        deadline = time.monotonic() + self._timeout
        errors = {place: failure_of(call, deadline, self._check) for place, call in calls.items()}
        return {place: error for place, error in errors.items() if error is not None}


def fill(buffer: torch.Tensor, stream: TensorStream, limit: int) -> Iterator[list[TensorSpec]]:
    """Packs the stream's tensors into a buffer, again and again; yields which ones are in it.

    Args:
      buffer: uint8, of at least `limit` bytes.
      stream: the tensors.
      limit: bytes of a bucket; at least those of the largest tensor.
    """
    tensors = stream.on_device()
    for bucket in split([spec.nbytes for spec in stream.specs], limit):
        specs, end = [stream.specs[number] for number in bucket], 0
        for spec in specs:
            _, array = next(tensors)
            buffer[end : end + spec.nbytes].copy_(as_tensor(array).reshape(-1).view(torch.uint8))
            end += spec.nbytes
        yield specs


def update_info(specs: Sequence[TensorSpec], handles: dict[str, Any]) -> dict[str, Any]:
    """What vLLM's `update_weights` must be told of a packed bucket.

    Args:
      specs: of the tensors in it, in order.
      handles: the buffer's, by the GPU's UUID.
    """
    return {
        "names": [spec.name for spec in specs],
        "dtype_names": [spec.dtype.name for spec in specs],
        "shapes": [list(spec.shape) for spec in specs],
        "tensor_sizes": [spec.nbytes for spec in specs],
        "ipc_handles": handles,
    }
