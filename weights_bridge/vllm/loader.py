"""A model loader for engines whose weights come over the bridge: nothing is read from a disk."""

from __future__ import annotations

import torch
from torch import nn
from vllm.config import ModelConfig

from weights_bridge.vllm.private import dummy_loader_class


class AwaitedWeightsLoader(dummy_loader_class()):
    """Fills parameters with small random numbers until the first update, and leaves buffers as the model made them.

    vLLM's own dummy loader overwrites the buffers too, among them the mean and deviation by which Qwen-VL's vision
    tower normalises images. No checkpoint holds those, so no update would ever bring them back.
    """

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Called by vLLM when it has built the model."""
        kept = [(buffer, buffer.clone()) for buffer in model.buffers() if not buffer.is_meta]
        super().load_weights(model, model_config)
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)
