"""argparse for people: complaints in one line, and numbers with their ranges."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

from lmmr1_jax.runtime.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line."""

    def error(self, message: str) -> None:
        raise UserError(f"{message} (see {self.prog} --help)")


def positive(text: str) -> int:
    """A whole number from 1."""
    return _number(text, int, lambda value: value >= 1, "a whole number from 1")


def count(text: str) -> int:
    """A whole number from 0."""
    return _number(text, int, lambda value: value >= 0, "a whole number from 0")


def not_negative(text: str) -> float:
    """A number from 0."""
    return _number(text, float, lambda value: 0 <= value < float("inf"), "a number from 0")


def above_zero(text: str) -> float:
    """A number above 0."""
    return _number(text, float, lambda value: 0 < value < float("inf"), "a number above 0")


def finite(text: str) -> float:
    """A number."""
    return _number(text, float, math.isfinite, "a finite number")


def share(text: str) -> float:
    """A number in (0, 1]."""
    return _number(text, float, lambda value: 0 < value <= 1, "a number above 0 and at most 1")


def _number(text: str, kind: type, holds: Callable[[Any], bool], what: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not holds(value):
        raise argparse.ArgumentTypeError(f"must be {what}, not {text!r}")
    return value
