"""What the config may say of vLLM, said before anything is loaded."""

from __future__ import annotations

import json
from typing import Any

from lmmr1_jax.config.schema import TrainConfig, VllmConfig
from lmmr1_jax.runtime.errors import UserError

# Arguments of vLLM that say what is sampled and what the engine's log-probs are of (weights from the bridge, no vision
# token, nothing of the model's own settings for sampling), and that no code which comes with a model is run.
_ARGUMENTS_OF_THE_RUN = (
    "model load_format logprobs_mode generation_config logits_processors additional_config weight_transfer_config "
    "async_scheduling trust_remote_code"
).split()


def check_vllm(config: TrainConfig) -> None:
    """Raises UserError for values of `vllm` that can't be used, alone or together."""
    vllm = config.vllm
    if vllm.colocate and config.rollout.staleness:
        raise UserError("vllm.colocate lets engines sleep while the learner works; rollout.staleness must be 0")
    if vllm.colocate and vllm.gpu_memory_utilization > 0.8:
        raise UserError(
            "vllm.colocate leaves the learner what vllm.gpu_memory_utilization does not take of each GPU; "
            f"{vllm.gpu_memory_utilization} is too much, 0.4 is a start"
        )
    engine_arguments(vllm)
    if vllm.label and not all(vllm.label.partition("=")):
        raise UserError(f"vllm.label is {vllm.label!r}; it must be NAME=VALUE")


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
