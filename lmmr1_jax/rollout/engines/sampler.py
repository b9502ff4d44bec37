"""The `Sampler` over a fleet of vLLM engines, which work beside the learner.

    with open_engines(config, processor, network, source) as sampler:
        sampler.load(params, version)
        groups = sample(sampler, prompts, 8, SamplingSettings(max_new_tokens=256))
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lmmr1_jax.rollout.engines.fleet import Fleet
from lmmr1_jax.rollout.engines.protocol import EngineSettings, GroupRequest, SampledCompletion
from lmmr1_jax.rollout.engines.requests import SampleHandle
from lmmr1_jax.rollout.sampler import Progress, SamplerLimits, SamplingSettings, no_progress
from lmmr1_jax.types.records import Completion, EncodedPrompt
from weights_bridge.stream import TensorStream


class VllmSampler:
    """A `ProbedSampler`; made by `open_engines`.

    Attributes:
      limits: the prompts that engines take.
      fleet: the engines.
      stream: makes the stream of parameters that a sync sends.
      version: of the loaded weights; None before there are any, and while engines sleep.
    """

    def __init__(
        self,
        fleet: Fleet,
        stream: Callable[[Mapping[str, Any]], TensorStream],
        settings: EngineSettings,
        merge_size: int,
        limits: SamplerLimits,
    ):
        """
        Args:
          fleet: the engines.
          stream: see the class.
          settings: what the engines were built with.
          merge_size: patches along an edge of what one image token stands for.
          limits: see the class.
        """
        self.limits = limits
        self.fleet = fleet
        self.version: int | None = None
        self.stream = stream
        self._settings, self._merged = settings, merge_size**2
        self._numbers = itertools.count()

    def load(self, params: Mapping[str, Any], version: int, *, in_flight: bool = False) -> None:
        """Gives the engines these weights.

        Args:
          params: the network's parameters; they are read until `release_params`.
          version: how many updates they have seen; completions carry it.
          in_flight: change them in the midst of completions.
        """
        self.fleet.load(self.stream(params), version, in_flight=in_flight)
        self.version = version

    def sleep(self) -> None:
        """Nothing is wanted until the next `load`: engines that share the learner's devices give their memory back."""
        if self._settings.sleeps:
            self.fleet.sleep()
            self.version = None

    def state_dict(self) -> dict[str, Any]:
        """Nothing of an engine outlives it."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""

    def release_params(self) -> None:
        """The parameters are about to be donated to an update."""
        self.fleet.release_params()

    def submit(self, prompts: Sequence[EncodedPrompt], n: int, settings: SamplingSettings) -> SampleHandle:
        """Begins to sample and returns at once.

        Raises:
          RuntimeError: there are no weights, because none were loaded yet, or none since `sleep`.
        """
        self._check_loaded()
        return self.fleet.submit([self._request(prompt, n, settings) for prompt in prompts])

    def collect(self, handle: SampleHandle, progress: Progress = no_progress) -> list[tuple[Completion, ...]]:
        """Waits for what `submit` began; calls `progress` with the number of groups that came, and of all.

        Raises:
          SamplingFailed: a prompt can't be sampled from, or no engine is left.
        """
        return [_completions(group) for group in self.fleet.collect(handle, progress)]

    def probe(self, prompt: EncodedPrompt, n: int, settings: SamplingSettings) -> list[tuple[Completion, ...]]:
        """n completions of one prompt from every engine, before all that waits; raises as `submit` and `collect`."""
        self._check_loaded()
        return [_completions(group) for group in self.fleet.probe(self._request(prompt, n, settings, urgent=True))]

    def _check_loaded(self) -> None:
        if self.version is None:
            raise RuntimeError("the engines have no weights: load them before sampling, and again after they slept")

    def _request(
        self, prompt: EncodedPrompt, n: int, settings: SamplingSettings, *, urgent: bool = False
    ) -> GroupRequest:
        return GroupRequest(
            name=f"{prompt.prompt.prompt_id}#{next(self._numbers)}",
            token_ids=prompt.token_ids,
            short_ids=self._short_ids(prompt),
            images=tuple(image.pixels for image in prompt.images),
            completions=n,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            ignore_ends=settings.ignore_ends,
            urgent=urgent,
        )

    def _short_ids(self, prompt: EncodedPrompt) -> np.ndarray:
        """The prompt with one token per image: vLLM expands it again, and the engine compares."""
        kept = np.ones(len(prompt.token_ids), bool)
        at = 0
        for image in prompt.images:
            tokens = int(np.prod(image.grid_thw)) // self._merged
            kept[prompt.image_slots[at + 1 : at + tokens]] = False
            at += tokens
        return prompt.token_ids[kept]


def _completions(group: Sequence[SampledCompletion]) -> tuple[Completion, ...]:
    return tuple(Completion(**vars(sampled)) for sampled in group)
