"""vLLM as a sampler: the same face as the built-in one, `load` and `sample`, over a fleet of engines.

    with open_sampler(config, processor, network, source) as sampler:
        sampler.load(params, version)
        groups = sampler.sample(encoded, 8, max_new_tokens=256)

`submit` and `collect` are the two halves of `sample`, for who has something to do in between.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lmmr1_jax.rollout.engines.fleet import Fleet
from lmmr1_jax.rollout.engines.protocol import EngineSettings, GroupRequest
from lmmr1_jax.rollout.engines.requests import SampleHandle
from lmmr1_jax.types.records import Completion, EncodedPrompt
from weights_bridge.stream import TensorStream

_log = logging.getLogger(__name__)


class VllmSampler:
    """Samples with the weights that `load` gave to the engines; made by `open_sampler`.

    Attributes:
      fleet: the engines.
      stream: makes the stream of parameters that a sync sends.
      version: of the loaded weights.
    """

    def __init__(
        self,
        fleet: Fleet,
        stream: Callable[[Mapping[str, Any]], TensorStream],
        settings: EngineSettings,
        merge_size: int,
    ):
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

    def state_dict(self) -> dict[str, Any]:
        """Nothing of an engine outlives it."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""

    def release_params(self) -> None:
        """The parameters are about to be donated to an update."""
        self.fleet.release_params()

    def sample(self, encoded: Sequence[EncodedPrompt], n: int, **settings: Any) -> list[tuple[Completion, ...]]:
        """n completions for each prompt, in order; arguments as in `submit`."""
        return self.collect(self.submit(encoded, n, **settings))

    def submit(
        self,
        encoded: Sequence[EncodedPrompt],
        n: int,
        *,
        max_new_tokens: int,
        key: Any = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        ignore_ends: bool = False,
    ) -> SampleHandle:
        """Begins to sample and returns at once.

        Args:
          key: not used: engines draw from random numbers of their own, seeded by the run's seed.
          temperature: 0 is greedy; log-probs are then those at temperature 1.
          top_p, top_k: truncate what is drawn from, and with it, unlike the built-in sampler's, the log-probs.
          ignore_ends: go on to exactly `max_new_tokens` tokens.
        """
        settings = dict(
            max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, ignore_ends=ignore_ends
        )
        return self.fleet.submit([self._request(prompt, n, **settings) for prompt in encoded])

    def collect(self, handle: SampleHandle) -> list[tuple[Completion, ...]]:
        """Waits for what `submit` began."""
        return [tuple(Completion(**vars(sampled)) for sampled in group) for group in self.fleet.collect(handle)]

    def probe(
        self, prompt: EncodedPrompt, n: int, *, max_new_tokens: int, temperature: float
    ) -> list[tuple[Completion, ...]]:
        """n completions of one prompt from every engine, before all that waits."""
        request = self._request(prompt, n, max_new_tokens=max_new_tokens, temperature=temperature, urgent=True)
        return [tuple(Completion(**vars(sampled)) for sampled in group) for group in self.fleet.probe(request)]

    def _request(self, prompt: EncodedPrompt, n: int, **settings: Any) -> GroupRequest:
        return GroupRequest(
            name=f"{prompt.prompt.prompt_id}#{next(self._numbers)}",
            token_ids=prompt.token_ids,
            short_ids=self._short_ids(prompt),
            images=tuple(image.pixels for image in prompt.images),
            completions=n,
            **settings,
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


