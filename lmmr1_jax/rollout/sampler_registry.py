"""Which sampler `rollout.sampler` names: the one place where it is chosen. Another one is a folder beside `local`, with
an entry here.

Nothing of a sampler is imported before it is opened, so that a wrong flag is answered at once.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from lmmr1_jax.config.schema import TrainConfig
from lmmr1_jax.rollout.engines.vllm.arguments import check_vllm
from lmmr1_jax.rollout.local.check import check_local
from lmmr1_jax.runtime.errors import UserError

if TYPE_CHECKING:
    from lmmr1_jax.rollout.loaded_model import LoadedModel
    from lmmr1_jax.rollout.sampler import Sampler


class OpenSampler(Protocol):
    """How a sampler is opened; it ends with the context."""

    def __call__(
        self,
        config: TrainConfig,
        load_model: Callable[[], LoadedModel],
        *,
        max_num_seqs: int | None = None,
        resumed_at: int = 0,
        check: Callable[[], None] = ...,
    ) -> AbstractContextManager[tuple[LoadedModel, Sampler]]:
        """The model with its sampler, which has no weights yet.

        Args:
          config: the sampler's own sections, and what it says of the model, the data and the lengths.
          load_model: gives the model; called inside, because some samplers start processes before JAX runs.
          max_num_seqs: completions that are sampled at a time; None is the sampler's own number.
          resumed_at: the step that a run goes on from.
          check: called while something is waited for; what it raises ends the waiting.
        """
        ...


@dataclasses.dataclass(frozen=True)
class SamplerEntry:
    """A sampler by its name.

    Attributes:
      check: raises UserError where a config's values can't be used with this sampler.
      open: opens it.
      sections: sections of the config that this sampler reads and no other one does.
      temperatures: the lowest and the highest temperature at which it samples as asked; greedy, 0, goes beside.
    """

    check: Callable[[TrainConfig], None]
    open: OpenSampler
    sections: tuple[str, ...] = ()
    temperatures: tuple[float, float] = (0.0, float("inf"))

    @property
    def temperature_range(self) -> str:
        """`temperatures` in words."""
        return "from {:g} to {:g}".format(*self.temperatures)

    def samples_at(self, temperature: float) -> bool:
        """Whether it samples at just this temperature."""
        lowest, highest = self.temperatures
        return lowest <= temperature <= highest


def _open_local(*arguments, **options):
    from lmmr1_jax.rollout.local.open import open_local

    return open_local(*arguments, **options)


def _open_vllm(*arguments, **options):
    from lmmr1_jax.rollout.engines.vllm.open import open_vllm

    return open_vllm(*arguments, **options)


SAMPLERS = {
    "jax": SamplerEntry(check_local, _open_local),
    # vLLM takes smaller temperatures for 0.01, in silence, and refuses larger ones.
    "vllm": SamplerEntry(check_vllm, _open_vllm, sections=("vllm", "ray"), temperatures=(0.01, 2.0)),
}


def sampler_entry(name: str) -> SamplerEntry:
    """The sampler of that name.

    Raises:
      UserError: there is none.
    """
    if name not in SAMPLERS:
        hint = difflib.get_close_matches(name, SAMPLERS, 1)
        also = f"; did you mean {hint[0]}?" if hint else ""
        raise UserError(f"rollout.sampler is {name!r}; it must be one of {', '.join(SAMPLERS)}{also}")
    return SAMPLERS[name]


def check_sampler(config: TrainConfig) -> None:
    """Checks what a config says of its sampler, before anything is loaded.

    Raises:
      UserError: there is no such sampler, it can't do what is asked for, or a section is set that it does not read.
    """
    name = config.rollout.sampler
    entry = sampler_entry(name)
    others = {section for other in SAMPLERS.values() for section in other.sections} - set(entry.sections)
    for section in sorted(others):
        values = getattr(config, section)
        for field in dataclasses.fields(values):
            if getattr(values, field.name) != getattr(type(values)(), field.name):
                raise UserError(
                    f"{section}.{field.name} is set, but rollout.sampler is {name}, which does not read it"
                )
    if not entry.samples_at(config.rollout.temperature):
        raise UserError(
            f"rollout.temperature is {config.rollout.temperature!r}; with rollout.sampler {name} it must be "
            f"{entry.temperature_range}"
        )
    entry.check(config)
