"""The model that is trained, with its sampler."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

from lmmr1_jax.config.schema import TrainConfig
from lmmr1_jax.rollout.loaded_model import LoadedModel, load_model
from lmmr1_jax.rollout.local.open import local_sampler
from lmmr1_jax.rollout.sampler import Sampler, apply_limits
from lmmr1_jax.rollout.sampler_registry import sampler_entry


@dataclasses.dataclass(frozen=True)
class PolicyModel(LoadedModel):
    """A model on its devices, with what samples from it.

    Attributes:
      sampler: the one that the config names; it has no weights yet.
    """

    sampler: Sampler


@contextlib.contextmanager
def open_policy(
    config: TrainConfig, *, resumed_at: int = 0, check: Callable[[], None] = lambda: None
) -> Iterator[PolicyModel]:
    """The policy with the sampler that the config names, which ends with the context. The policy's processor skips
    prompts that the sampler would not take.

    Args:
      config: the run's.
      resumed_at: the step that the run goes on from.
      check: called while a sampler is waited for; what it raises ends the waiting.
    """
    open_sampler = sampler_entry(config.rollout.sampler).open
    with open_sampler(config, lambda: load_model(config), resumed_at=resumed_at, check=check) as (model, sampler):
        apply_limits(model.processor, sampler.limits)
        yield PolicyModel(**vars(model), sampler=sampler)


def assemble_policy(config: TrainConfig) -> PolicyModel:
    """The policy with the built-in sampler, whatever the config names."""
    model = load_model(config)
    return PolicyModel(**vars(model), sampler=local_sampler(model))
