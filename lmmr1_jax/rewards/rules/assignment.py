"""Which verifier judges which problem: the row's own, else its data source's, else the run's.

Names are checked here, before anything is loaded; what they mean stands in `comparators.py`. A run's config may name a
comparison of one's own, FILE.py:FUNCTION; rows and requests may not. Nothing here imports jax.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from lmmr1_jax.config.schema import RewardsConfig
from lmmr1_jax.data.faults import UNPARSABLE_ANSWER
from lmmr1_jax.runtime.errors import UserError

NAMES = ("math", "number", "choice", "text")


@functools.lru_cache(maxsize=256)
def read_name(name: str) -> tuple[str, float]:
    """(kind, tolerance) of "math", "number", "number:0.05", "choice" or "text".

    Raises:
      UserError: there is no such verifier.
    """
    kind, colon, tolerance = name.partition(":")
    try:
        allowed = float(tolerance) if colon else 0.0
    except ValueError:
        allowed = math.nan
    if kind not in NAMES or (colon and kind != "number") or not 0 <= allowed < 1:
        raise UserError(
            f"there is no verifier {name!r}; known are {', '.join(NAMES)}, and number:0.05 for a number that may be "
            "5 % off"
        )
    return kind, allowed


def own_parts(name: str) -> tuple[str, str] | None:
    """(file, function) of a verifier FILE.py:FUNCTION; None for another name."""
    file, _, function = name.rpartition(":")
    return (file, function) if file.endswith(".py") and function.isidentifier() else None


def check_name(name: str) -> None:
    """Raises UserError where a config can't name this verifier: it doesn't exist, or its file doesn't."""
    own = own_parts(name)
    if own is None:
        if name.partition(":")[0].endswith(".py"):
            raise UserError(f"{name!r} names no function; one's own verifier is FILE.py:FUNCTION")
        read_name(name)
    elif not Path(own[0]).is_file():
        raise UserError(f"{own[0]}: there is no such file")


def own_verifiers(config: RewardsConfig) -> tuple[str, ...]:
    """The verifiers FILE.py:FUNCTION that a config names, each once."""
    names = [config.verifier, *by_source(config).values()]
    return tuple(dict.fromkeys(name for name in names if own_parts(name)))


def by_source(config: RewardsConfig) -> dict[str, str]:
    """The verifier of each data source that `rewards.verifiers` names.

    Raises:
      UserError: an entry that can't be read, an unknown verifier, or a field that `lmm-r1` doesn't read.
    """
    chosen: dict[str, str] = {}
    for field, name in [("verifier", config.verifier), *(("verifiers", entry) for entry in config.verifiers)]:
        if field == "verifiers":
            source, equals, name = name.rpartition("=")
            if not equals or not source or source in chosen:
                wrong = "stands there twice" if source in chosen else "is not SOURCE=VERIFIER, as in geometry=number"
                raise UserError(f"rewards.verifiers: {source or name!r} {wrong}")
            chosen[source] = name
        try:
            check_name(name)
        except UserError as error:
            raise UserError(f"rewards.{field}: {error}") from None
        if config.variant == "lmm-r1" and name != "math":
            raise UserError(f"rewards.{field} is set, but rewards.variant lmm-r1 judges everything by its own rules")
    return chosen


PromptT = TypeVar("PromptT")  # a types.Prompt, whose module imports jax


def choose(prompts: Sequence[PromptT], config: RewardsConfig, verifier_key: str = "verifier") -> list[PromptT]:
    """The same prompts, each with the name of its verifier.

    Raises:
      UserError: a row names a verifier that doesn't exist.
    """
    sources, chosen = by_source(config), []
    for prompt in prompts:
        name = prompt.verifier or sources.get(prompt.data_source, config.verifier)
        try:
            if prompt.verifier and read_name(name)[0] != "math" and config.variant == "lmm-r1":
                raise UserError("rewards.variant lmm-r1 judges everything by its own rules")
        except UserError as error:
            raise UserError(
                f"{prompt.file}: row {prompt.row} has {verifier_key!r} {name!r}: {error} "
                "(data.verifier_key names the key)"
            ) from None
        chosen.append(dataclasses.replace(prompt, verifier=name))
    return chosen


def readable(prompts: Sequence[PromptT], verifier: Any, skips: Any) -> list[PromptT]:
    """The prompts whose gold answers their verifiers can read; the others go to `skips`, a `SkipLog`.

    An answer that can't be read would teach nothing, or, as in LMM-R1, reward everything; only the variant `lmm-r1`
    keeps it.

    Args:
      prompts: with verifiers chosen.
      verifier: the `Verifier`.

    Raises:
      UserError: none can be read.
    """
    pairs = list(dict.fromkeys((prompt.label, prompt.verifier) for prompt in prompts))  # few answers, many rows
    known = verifier.parsable([label for label, _ in pairs], [name for _, name in pairs])
    is_readable = dict(zip(pairs, known, strict=True))
    kept = []
    for prompt in prompts:
        if is_readable[prompt.label, prompt.verifier]:
            kept.append(prompt)
        else:
            detail = f"the verifier {prompt.verifier} can't read {prompt.label[:200]!r}"
            skips.add(prompt.file, prompt.row, UNPARSABLE_ANSWER, detail)
    if prompts and not kept:
        raise UserError(
            f"{prompts[0].file}: none of the {len(prompts)} answers can be read by its verifier; is the key of the "
            "answers right?"
        )
    return kept


def check_sources(config: RewardsConfig, prompts: Sequence[PromptT]) -> None:
    """Raises UserError where `rewards.verifiers` names a data source that none of the prompts comes from."""
    present = {prompt.data_source for prompt in prompts}
    for source in by_source(config):
        if source not in present:
            known = ", ".join(sorted(present)[:20])
            raise UserError(f"rewards.verifiers names the data source {source!r}; the data has {known}")
