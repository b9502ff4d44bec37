"""argparse for people: complaints in one line, and numbers with their ranges."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lmmr1_jax.runtime.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line."""

    def __init__(self, *args: Any, renamed: Mapping[str, str] | None = None, **settings: Any):
        """
        Args:
          renamed: flags that there are no longer, and their names now.
          args, settings: argparse's.
        """
        super().__init__(*args, **settings)
        self._renamed = renamed or {}

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        for word in sys.argv[1:] if args is None else args:  # first: else argparse asks for other flags instead
            old = word.partition("=")[0]
            if old in self._renamed:
                raise UserError(f"{old} is now {self._renamed[old]}")
        return super().parse_args(args, namespace)

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
