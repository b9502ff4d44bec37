"""What `vllm.arguments` may hold, and the temperatures at which vLLM samples as asked."""

from __future__ import annotations

import json
from typing import Any

from lmmr1_jax.config.schema import VllmConfig
from lmmr1_jax.runtime.errors import UserError

# Arguments of vLLM that say what is sampled and what the engine's log-probs are of (weights from the bridge, no vision
# token, nothing of the model's own settings for sampling), and that no code which comes with a model is run.
_ARGUMENTS_OF_THE_RUN = (
    "model load_format logprobs_mode generation_config logits_processors additional_config weight_transfer_config "
    "async_scheduling trust_remote_code"
).split()
VLLMS_RANGE = "from 0.01 to 2"
"""Temperatures: vLLM takes smaller ones for 0.01, in silence, and refuses larger ones."""


def in_vllms_range(temperature: float) -> bool:
    """Whether vLLM samples at just this temperature."""
    return 0.01 <= temperature <= 2


def engine_arguments(vllm: VllmConfig) -> dict[str, Any]:
    """What `vllm.arguments` says.

    Raises:
      UserError: it is no JSON object, or names an argument that is the run's own.
    """
    try:
        arguments = json.loads(vllm.arguments or "{}")
    except ValueError as error:
        raise UserError(f"vllm.arguments is no JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise UserError("vllm.arguments must be a JSON object")
    for name in arguments:
        if name in _ARGUMENTS_OF_THE_RUN:
            raise UserError(
                f"vllm.arguments has {name!r}, which is not to be chosen: what engines sample, report and run depends "
                "on it; leave it out"
            )
    return arguments
