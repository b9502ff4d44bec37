"""What samples: the interface that the built-in sampler (`rollout.local`) and engines (`rollout.engines`) share.

    sampler.load(params, version)
    groups = sample(sampler, prompts, 8, SamplingSettings(max_new_tokens=256, key=key))

A sampler that works beside the learner begins at `submit`; `collect` waits for it.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from lmmr1_jax.data.processor import Processor
from lmmr1_jax.types.records import Completion, EncodedPrompt

_log = logging.getLogger(__name__)

Handle = Any
"""What `submit` returns and `collect` takes; each sampler has a kind of its own."""
Progress = Callable[[int, int], None]
"""Called with the number of parts of the work that are done, and of all parts."""


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """How completions are sampled.

    Attributes:
      max_new_tokens: limit of a completion.
      temperature: 0 is greedy; log-probs are then those at temperature 1.
      top_p, top_k: truncate what is drawn from; 1 and 0 are off. The built-in sampler's log-probs are those of the
        distribution before it is truncated, an engine's those after.
      ignore_ends: go on to exactly `max_new_tokens` tokens (for benchmarks).
      key: a JAX random key (`local.sampler.sampling_key`). Engines draw from random numbers of their own, which the
        run's seed seeds, and do not read it.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    ignore_ends: bool = False
    key: Any = None


@dataclasses.dataclass(frozen=True)
class SamplerLimits:
    """The prompts that a sampler takes; None is no limit.

    Attributes:
      max_prompt_tokens: tokens of a prompt, every image expanded.
      max_images: images of a prompt.
    """

    max_prompt_tokens: int | None = None
    max_images: int | None = None


class Sampler(Protocol):
    """Samples completions with the weights that `load` gave it.

    Attributes:
      limits: the prompts that it takes.
    """

    limits: SamplerLimits

    def load(self, params: Mapping[str, Any], version: int, *, in_flight: bool = False) -> None:
        """Takes the weights; what is collected from here on is sampled with them, as far as it was not begun before.

        Args:
          params: the network's parameters, read until `release_params`.
          version: how many updates they have seen; each token of a completion carries its own.
          in_flight: whether completions that are being sampled go on with the new weights; otherwise they end first.
        """
        ...

    def submit(self, prompts: Sequence[EncodedPrompt], n: int, settings: SamplingSettings) -> Handle:
        """Asks for n completions of each prompt and returns at once."""
        ...

    def collect(self, handle: Handle, progress: Progress = ...) -> list[tuple[Completion, ...]]:
        """Waits for what `submit` asked for: a group per prompt, in order; `progress` is called on the way.

        Raises:
          SamplingFailed: no engine can serve it.
        """
        ...

    def release_params(self) -> None:
        """Reads the parameters no more: an update is about to donate their memory."""
        ...

    def sleep(self) -> None:
        """Gives memory back to the learner; nothing can be sampled until the next `load`."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must restore to sample the same again."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to `state`."""
        ...


class ProbedSampler(Sampler, Protocol):
    """A sampler of several engines, each of which can be asked by itself."""

    def probe(self, prompt: EncodedPrompt, n: int, settings: SamplingSettings) -> list[tuple[Completion, ...]]:
        """n completions of the prompt from every engine that has weights, before all that waits there."""
        ...


def no_progress(done: int, of: int) -> None:
    """Tells nobody."""


def sample(
    sampler: Sampler, prompts: Sequence[EncodedPrompt], n: int, settings: SamplingSettings
) -> list[tuple[Completion, ...]]:
    """n completions of each prompt, in order."""
    return sampler.collect(sampler.submit(prompts, n, settings))


def apply_limits(processor: Processor, limits: SamplerLimits) -> None:
    """From here on the processor skips prompts that the sampler would not take."""
    if limits.max_images is not None:
        processor.max_images = limits.max_images
    longest = limits.max_prompt_tokens
    if longest is not None and longest < processor.max_prompt_tokens:
        _log.warning(
            "prompts of more than %d tokens are skipped: the sampler takes no longer ones with their completions",
            longest,
        )
        processor.max_prompt_tokens = longest
