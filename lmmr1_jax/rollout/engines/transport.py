"""How weights travel to engines, and what both ends say of the model before the first ones do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lmmr1_jax.config.schema import VllmConfig
from lmmr1_jax.runtime.errors import UserError
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


def init_info(config: Mapping[str, Any], stream: TensorStream) -> dict[str, Any]:
    """The learner's model, for the receiving end to compare its own with.

    Args:
      config: the contents of config.json.
      stream: what each update will send.
    """
    text = config.get("text_config") or config
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "tie_word_embeddings")
    model = {name: text.get(name, config.get(name)) for name in names} | {"model_type": config["model_type"]}
    return {"model": model, "tensors": {spec.name: [spec.dtype.name, list(spec.shape)] for spec in stream.specs}}
