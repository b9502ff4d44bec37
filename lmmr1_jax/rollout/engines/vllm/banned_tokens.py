"""The banned tokens, inside vLLM: a logits processor of its own kind, for all requests at once.

Of the kind that vLLM's first model runner takes; `build.set_environment` asks for that one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from weights_bridge.vllm.private import logits_processor_class

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class BannedTokens(logits_processor_class()):
    """Sets the logits of `additional_config["banned_token_ids"]` to minus infinity: never sampled, no probability."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool):
        ids = vllm_config.additional_config["banned_token_ids"]
        self._banned = torch.tensor(ids, dtype=torch.long, device=device)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits `[requests, vocabulary]`, changed in place."""
        return logits.index_fill_(1, self._banned, float("-inf"))

    def is_argmax_invariant(self) -> bool:
        """A banned token may be the likeliest."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """The same for every request."""
