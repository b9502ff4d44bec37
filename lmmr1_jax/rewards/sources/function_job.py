"""A reward function as a worker's job (`fork_server.py`): tasks are rollouts as plain data (`functions.as_data`).

Loaded after the fork, in a process of its own: whatever the file imports or starts is the user's, and ends with it.
An answer is a list with one pair per completion: what it earned, and its named parts ("" is the function's own name).
Nothing here imports jax.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import os
import signal
from collections.abc import Callable
from typing import Any

from lmmr1_jax.runtime.python_file import load_module, place

DEFAULT_NAME = "reward_func"

Judged = list[tuple[float, dict[str, float]]]


def prepare() -> None:
    """Nothing: a file that starts threads must not be loaded before a fork."""


def begin(file: str, name: str) -> Callable[[dict[str, Any] | None], Judged | None]:
    """Loads the file and returns the function that answers tasks; None is answered by None.

    Raises:
      ValueError: why the function can't be called; the text is for the user.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # which programs that it starts would inherit
        signal.signal(number, signal.SIG_DFL)
    os.dup2(2, 1)  # what it prints is for people, on stderr
    function = load(file, name)
    call = caller(function, name or DEFAULT_NAME)

    def answer_to(rollout: dict[str, Any] | None) -> Judged | None:
        if rollout is None:
            return None
        try:
            returned = call(rollout)
            if inspect.isawaitable(returned):
                returned = asyncio.run(_result_of(returned))
        except (Exception, SystemExit) as error:
            raise RaisedError(f"raised {type(error).__name__}: {error}{place(file, error)}") from None
        try:
            return judged(returned, len(rollout["completions"]))
        except (TypeError, ValueError, OverflowError) as error:
            raise RaisedError(f"returned {error}") from None

    return answer_to


class RaisedError(Exception):
    """What a call came to, in words that follow the function's name."""


def load(file: str, name: str) -> Callable[..., Any]:
    """The function of that name (`reward_func` where it is empty) in a file, which may import its neighbours."""
    module = load_module(file)
    function = getattr(module, name or DEFAULT_NAME, None)
    if not callable(function):
        own = [key for key, value in vars(module).items() if inspect.isfunction(value) and key[0] != "_"]
        known = f"it defines {', '.join(own)}" if own else "it defines none"
        raise ValueError(f"has no function {name or DEFAULT_NAME!r} ({known}); FILE.py:FUNCTION names another")
    return function


def caller(function: Callable[..., Any], name: str) -> Callable[[dict[str, Any]], Any]:
    """How to call the function on a rollout, by the arguments that it takes.

    Raises:
      ValueError: it takes others than one rollout, or queries, prompts and labels.
    """

    signature = inspect.signature(function)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [one.name for one in signature.parameters.values() if one.kind in kinds and one.default is one.empty]

    def takes(count: int) -> bool:
        try:
            signature.bind(*range(count))
        except TypeError:
            return False
        return True

    def columns(rollout: dict[str, Any]) -> tuple[list[str], list[str], list[str]]:
        completions = rollout["completions"]
        queries = [rollout["prompt"] + completion["raw_text"] for completion in completions]
        return queries, [rollout["prompt"]] * len(completions), [rollout["label"] or ""] * len(completions)

    alone = len(needed) == 1 and needed[0] not in ("queries", "query")
    if takes(1) and (alone or not takes(2)):
        return function
    if takes(3):
        return lambda rollout: function(*columns(rollout))
    if takes(2):  # LMM-R1's first version gave no labels
        return lambda rollout: function(*columns(rollout)[:2])
    raise ValueError(
        f"{name}{signature} must take (queries, prompts, labels), or (rollout), and nothing else without a default"
    )


def judged(returned: Any, count: int) -> Judged:
    """What a function returned, as numbers: a list of numbers or of dicts of named numbers, or OpenRLHF's dict with
    "rewards" and "extra_logs".

    Raises:
      TypeError, ValueError: it is something else, of another length, or not finite; the text follows "returned".
    """
    extra: dict[str, list[Any]] = {}
    if isinstance(returned, dict):
        if "rewards" not in returned:
            raise TypeError("a dict without 'rewards'")
        extra = {str(key): _sequence(column, count) for key, column in (returned.get("extra_logs") or {}).items()}
        returned = returned["rewards"]
    rows = []
    for number, value in enumerate(_sequence(returned, count)):
        if isinstance(value, dict):
            parts = {str(key): _finite(part, f"{key!r} of completion {number}") for key, part in value.items()}
            earned = parts["reward"] if "reward" in parts else sum(parts.values())
        else:
            earned, parts = _finite(value, f"completion {number}"), {}
        parts = {"" if key == "reward" else key: part for key, part in parts.items()} or {"": earned}
        parts |= {key: _finite(column[number], f"{key!r} of completion {number}") for key, column in extra.items()}
        rows.append((earned, parts))
    return rows


async def _result_of(awaitable: Any) -> Any:
    return await awaitable


def _sequence(values: Any, count: int) -> list[Any]:
    if hasattr(values, "tolist"):  # an array or a tensor
        values = values.tolist()
    if not isinstance(values, list | tuple):
        raise TypeError(f"{type(values).__name__}, not a list with a number for each of the {count} completions")
    if len(values) != count:
        raise ValueError(f"{len(values)} values for {count} completions")
    return list(values)


def _finite(value: Any, what: str) -> float:
    try:
        number = float(value) if not isinstance(value, str | bytes) else None
    except (TypeError, ValueError):
        number = None
    if number is None:
        raise TypeError(f"{type(value).__name__} for {what}, not a number")
    if not math.isfinite(number):
        raise ValueError(f"{number} for {what}")
    return number
