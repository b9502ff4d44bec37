"""How weights travel to engines, and what both ends say of the model before the first ones do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lmmr1_jax.config.schema import VllmConfig
from lmmr1_jax.runtime.errors import UserError
from weights_bridge.architecture import Architecture
from weights_bridge.errors import TransportError
from weights_bridge.stream import TensorStream
from weights_bridge.transports.host import HostTransport


def choose_transport(config: VllmConfig, check: Callable[[], None] = lambda: None, *, on_gpu: bool) -> Any:
    """How weights travel, to engines on GPUs or on CPUs.

    Raises:
      UserError: these engines can't take them so.
      TransportError: this learner can't send them so.
    """
    if config.transport in ("nccl", "ipc") and not on_gpu:
        raise UserError(f"vllm.transport {config.transport} needs engines on GPUs, and these run on CPUs; use host")
    limits = {"bucket_bytes": config.bucket_mib << 20, "timeout": config.sync_timeout, "check": check}
    if config.transport == "nccl":
        from weights_bridge.transports.nccl import NcclTransport

        return NcclTransport(ranks_per_engine=config.tensor_parallel, **limits)
    if config.transport == "ipc":
        try:
            from weights_bridge.transports.ipc import IpcTransport
        except ImportError as error:  # torch is none of the learner's packages
            raise TransportError(f"the ipc transport needs a torch with CUDA beside JAX: {error}") from None

        return IpcTransport(**limits)
    return HostTransport(**limits)


def init_info(config: Architecture, stream: TensorStream) -> dict[str, Any]:
    """The learner's model, for the receiving end to compare its own with.

    Args:
      config: the learner's, from its config.json.
      stream: what each update will send.
    """
    text = config.text
    model = {
        "model_type": config.model_type,
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "num_hidden_layers": text.num_layers,
        "tie_word_embeddings": text.tie_word_embeddings,
    }
    return {"model": model, "tensors": {spec.name: [spec.dtype.name, list(spec.shape)] for spec in stream.specs}}
