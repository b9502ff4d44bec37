"""All that is used of vLLM beyond the interfaces that it documents, as it is in vLLM 0.32. Look here first when vLLM is
updated. (Documented, and used elsewhere: `EngineArgs`, `SamplingParams`, the plugin entry point, the base classes of
weight transfer, `collective_rpc`, sleep mode.)

vLLM is imported inside the functions, because each of its processes needs another part of it.
"""

from __future__ import annotations

from typing import Any


def has_transfer_engine(backend: str) -> bool:
    """Whether a weight-transfer engine is registered under that name.

    `WeightTransferEngineFactory._registry`: registering a name twice raises, and nothing else tells what is there.
    """
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    return backend in WeightTransferEngineFactory._registry


def dummy_loader_class() -> type:
    """The loader that builds a model without reading weights; ours goes on from it.

    `model_loader.dummy_loader`: loaders can be registered, but of those that vLLM has only the base is documented.
    """
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    return DummyModelLoader


def begin_layerwise_reload(model: Any) -> None:
    """Opens an update: from here on a layer's tensors are collected as they come, and put in place when it is whole.

    `model_loader.reload`: vLLM's own weight-transfer engines call it, and so must ours; the base class does not.
    """
    from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

    initialize_layerwise_reload(model)


def end_layerwise_reload(model: Any, model_config: Any) -> None:
    """Closes what `begin_layerwise_reload` opened."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    finalize_layerwise_reload(model, model_config)


def build_engine(engine_args: Any) -> Any:
    """The engine that is stepped by its owner.

    `v1.engine.llm_engine.LLMEngine`: the documented `LLM` steps by itself until all is done, and `AsyncLLM` in a
    process of its own; in neither can weights change at a known token.
    """
    from vllm.v1.engine.llm_engine import LLMEngine

    return LLMEngine.from_engine_args(engine_args)


def shut_down(engine: Any) -> None:
    """Ends the engine's worker processes.

    `LLMEngine.engine_core.shutdown`: `LLMEngine` leaves it to the garbage collector.
    """
    engine.engine_core.shutdown()


def logits_processor_class() -> type:
    """The base of logits processors for vLLM's first model runner.

    `v1.sample.logits_processor`: documented, but the second runner has another class of that name, so the module is
    the choice of a runner (`VLLM_USE_V2_MODEL_RUNNER`).
    """
    from vllm.v1.sample.logits_processor import LogitsProcessor

    return LogitsProcessor
