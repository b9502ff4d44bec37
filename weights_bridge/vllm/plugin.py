"""What vLLM calls in every one of its processes, through the entry point group `vllm.general_plugins`."""

from __future__ import annotations

from weights_bridge.vllm.private import has_transfer_engine

HOST_BACKEND = "lmmr1_host"
"""`WeightTransferConfig(backend=HOST_BACKEND)` selects the engine that takes weights from host memory."""

AWAIT_WEIGHTS = "lmmr1_await"
"""`load_format` of a model that is built without weights."""


def register() -> None:
    """Registers the weight-transfer engine and the model loader; vLLM may call this more than once in a process.

    Raises:
      RuntimeError: this vLLM has no weight transfer to plug into.
    """
    try:
        from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    except ImportError as error:
        import vllm

        raise RuntimeError(
            f"vLLM {getattr(vllm, '__version__', '?')} has no weight-transfer plugins; install vllm>=0.32"
        ) from error
    if has_transfer_engine(HOST_BACKEND):
        return
    from vllm.model_executor.model_loader import register_model_loader

    from weights_bridge.vllm.loader import AwaitedWeightsLoader

    register_model_loader(AWAIT_WEIGHTS)(AwaitedWeightsLoader)
    WeightTransferEngineFactory.register_engine(
        HOST_BACKEND, "weights_bridge.vllm.receiver", "HostWeightTransferEngine"
    )
