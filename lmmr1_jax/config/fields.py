"""The fields of a config, flattened to dotted names, and the checks that a value has its field's type and range.

Dataclasses do not check what they are given, and a config file is Python: `learning_rate="1e-6"` would only be
noticed deep inside the optimizer. Everything here is plain Python, without jax and without tyro.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar

from lmmr1_jax.config.ranges import ANY, Range
from lmmr1_jax.runtime.errors import UserError

Config = TypeVar("Config")


def field_types(config_class: type) -> dict[str, Any]:
    """The type of every leaf field, by its dotted name: {"run.dir": str, "learner.remat": Literal[...], ...}."""
    return {name: typing.get_args(hint)[0] if _is_annotated(hint) else hint for name, hint in _leaves(config_class)}


def field_ranges(config_class: type) -> dict[str, Range]:
    """The range of every leaf field, by its dotted name; `ranges.ANY` for those that name none."""
    found = {}
    for name, hint in _leaves(config_class):
        notes = typing.get_args(hint)[1:] if _is_annotated(hint) else ()
        found[name] = next((note for note in notes if isinstance(note, Range)), ANY)
    return found


def check_ranges(config: Any) -> None:
    """Raises UserError for the first number outside its field's range; it names the field, value and range."""
    for name, allowed in field_ranges(type(config)).items():
        value = functools.reduce(getattr, name.split("."), config)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and (wanted := allowed.missed_by(value)):
            raise UserError(f"{name} is {value!r}; it must be {wanted}")


def describe_type(hint: Any) -> str:
    """What a person should write there: "a float", "one of none, attention, full", "a list of int"."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is type(None):
        return "None"
    if hint is bool:
        return "True or False"
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe_type(argument) for argument in arguments)
    if origin in (tuple, list):
        return f"a {origin.__name__} of {arguments[0].__name__}"
    article = "an" if hint.__name__[0] in "aeiouAEIOU" else "a"
    return f"{article} {hint.__name__}"


def has_type(value: Any, hint: Any) -> bool:
    """Whether a value may stand in a field: an int may stand for a float, a bool for nothing but a bool."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return any(has_type(value, argument) for argument in arguments)
    if origin in (tuple, list):
        return isinstance(value, origin) and all(has_type(item, arguments[0]) for item in value)
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return isinstance(value, int | float)
    return isinstance(value, hint)


def checked(config: Config, where: str) -> Config:
    """The same config after every field was compared with its type; ints in float fields become floats.

    Raises:
      UserError: names `where` (a file), the field, its value and what would be right.
    """
    hints = typing.get_type_hints(type(config))
    values = {}
    for field in dataclasses.fields(config):
        value, hint, name = getattr(config, field.name), hints[field.name], f"{where}.{field.name}"
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, hint):
                raise UserError(f"{name} is {value!r}; it must be {describe_type(hint)}")
            values[field.name] = checked(value, name)
        elif not has_type(value, hint):
            raise UserError(f"{name} is {value!r}; it must be {describe_type(hint)}")
        else:
            values[field.name] = float(value) if hint is float else value
    return dataclasses.replace(config, **values)


def close_matches(word: str, known: typing.Iterable[str]) -> str:
    """The end of an error message about an unknown name: "; did you mean A or B?", or an empty string.

    The right field in the wrong group, or in none, counts first: `--learning-rate` finds `--learner.learning-rate`.
    Names of the right group are compared without it, and listed when none of them comes close.
    """
    known = list(known)
    group, _, last = word.removeprefix("--").rpartition(".")
    found = [name for name in known if _split(name)[1] == last]
    siblings = [name for name in known if group and _split(name)[0] == group]
    by_last = {_split(name)[1]: name for name in siblings}
    found += [by_last[name] for name in difflib.get_close_matches(last, by_last, n=3)]
    if siblings and not found:
        return f"; {group} has {', '.join(by_last)}"
    if not siblings:
        found += difflib.get_close_matches(word, known, n=3)
    found = list(dict.fromkeys(found))[:3]
    return f"; did you mean {' or '.join(found)}?" if found else ""


def _leaves(config_class: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and annotation of every field that is no group of fields, with what `Annotated` adds to it."""
    hints = typing.get_type_hints(config_class, include_extras=True)
    for field in dataclasses.fields(config_class):
        hint, name = hints[field.name], f"{prefix}{field.name}"
        if dataclasses.is_dataclass(hint):
            yield from _leaves(hint, f"{name}.")
        else:
            yield name, hint


def _is_annotated(hint: Any) -> bool:
    return typing.get_origin(hint) is Annotated


def _split(name: str) -> tuple[str, str]:
    group, _, last = name.removeprefix("--").rpartition(".")
    return group, last
