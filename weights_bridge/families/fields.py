"""Fields of a `config.json`, checked as they are read. A field that is null counts as missing, as in transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weights_bridge.errors import CheckpointError

Fields = Mapping[str, Any]


def whole_number(fields: Fields, name: str, default: int | None = None, *, least: int = 1) -> int:
    """A whole number of at least `least`; without a default the field must be there."""
    value = _present(fields, name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        kind = "a positive whole number" if least == 1 else f"a whole number of at least {least}"
        raise CheckpointError(f"{name} is {value!r}, {kind} is needed")
    return value


def optional_whole_number(fields: Fields, name: str, *, least: int = 1) -> int | None:
    """The same, or None where the field is missing."""
    return None if fields.get(name) is None else whole_number(fields, name, least=least)


def number(fields: Fields, name: str, default: float | None = None) -> float:
    """A number; without a default the field must be there."""
    value = _present(fields, name, default)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise CheckpointError(f"{name} is {value!r}, a number is needed")
    return float(value)


def table(fields: Fields, name: str) -> Fields | None:
    """An object with fields of its own; None where the field is missing."""
    value = fields.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise CheckpointError(f"{name} is {value!r}, an object is needed")
    return value


def _present(fields: Fields, name: str, default: Any) -> Any:
    value = fields.get(name)
    if value is None:
        value = default
    if value is None:
        raise CheckpointError(f"the field {name} is missing")
    return value
