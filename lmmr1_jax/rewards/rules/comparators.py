"""What makes an answer the right one, by the kind of problem.

| name | the gold answer is | an answer is right when |
| --- | --- | --- |
| `math` | a formula, a number, an option or words | it is the same mathematically; options and words as such |
| `number` | one number | it is one number and equal; `number:0.05` allows a relative difference of 5 % |
| `choice` | an option, A to Z | it chooses this option and no other |
| `text` | any text | it is the same text but for white space and a box around it |
| `FILE.py:FUNCTION` | any text | the function, one's own, says so |
"""

from __future__ import annotations

import functools
import inspect
import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction

from lmmr1_jax.rewards.rules.answers import Answer, boxes_in, gold_answer, read_block, same, unfont
from lmmr1_jax.rewards.rules.assignment import own_parts, read_name
from lmmr1_jax.runtime.python_file import load_module


def is_comparable(label: str, verifier: str = "math") -> bool:
    """Whether a gold answer is of the verifier's kind."""
    if verifier in _own:
        return bool(label.strip())
    kind, _ = read_name(verifier)
    if kind == "text":
        return bool(_plain(label))
    gold = gold_answer(label)
    if kind == "number":
        return number_in(gold) is not None
    if kind == "choice":
        return option_in(gold) is not None
    return gold.comparable


def is_right(block: str, label: str, verifier: str = "math") -> bool | float:
    """Whether the content of an answer block gives the gold answer; nothing does where that is not comparable.

    A function of one's own may say it by halves, from 0 to 1.
    """
    if not is_comparable(label, verifier):
        return False
    if verifier in _own:
        return _share(_own[verifier](block, label), verifier)
    kind, tolerance = read_name(verifier)
    if kind == "text":
        return _plain(block) == _plain(label)
    gold, answer = gold_answer(label), read_block(block)
    if kind == "number":
        wanted, given = number_in(gold), number_in(answer)
        return given is not None and abs(given - wanted) <= Fraction(tolerance) * abs(wanted)
    if kind == "choice":
        return option_in(gold) == option_in(answer)
    return same(gold, answer)


_own: dict[str, Callable[[str, str], bool | float]] = {}


def load_own(verifier: str) -> None:
    """Loads the function of a verifier FILE.py:FUNCTION; this process knows the name from then on, and no other file.

    Raises:
      ValueError: the file can't be loaded, or has no such function; the text names the file.
    """
    file, name = own_parts(verifier)
    try:
        function = getattr(load_module(file), name, None)
        if not callable(function):
            raise ValueError(f"has no function {name!r}")
        try:
            inspect.signature(function).bind("answer", "gold")
        except TypeError as error:
            raise ValueError(f"{name} must take (answer, gold): {error}") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    _own[verifier] = function


def _share(returned: bool | float, verifier: str) -> float:
    # Arrays of one number are fine; NaN compares as false.
    if isinstance(returned, str | bytes) or returned is None or not 0 <= float(returned) <= 1:
        raise ValueError(f"{verifier} returned {returned!r}; it must be True, False or a number from 0 to 1")
    return float(returned)


def option_in(answer: Answer) -> str | None:
    """The one option that an answer chooses; None where it names several ("A or B") or none."""
    text = unfont(answer.latex)
    several = r"\b([A-Z])[)\]]?\s*(?:[,/;&]|\b(?:and|or)\b)[\s,]*(?:and|or)?\s*[(\[]?(?!I\s+[a-z])([A-Z])\b"
    if any(one != other for one, other in re.findall(several, text)):
        return None
    for listed in (r"(?i:option|choice)\s*:?\s*[(\[]?([A-Z])\b", r"\b([A-Z])\s?[.):]"):
        if len(set(re.findall(listed, text))) > 1:
            return None
    return answer.chosen_letter


_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,200})(?:\.[0-9]{0,200})?|\.[0-9]{1,200}"
_NUMBER = re.compile(
    rf"(?<![A-Za-z0-9.])(?P<sign>[+-]?)\s*(?:(?P<whole>[0-9]{{1,200}})?\s*\\frac\{{(?P<over>{_DIGITS})\}}\{{(?P<under>{_DIGITS})\}}"
    rf"|(?P<top>{_DIGITS})\s*/\s*(?P<bottom>{_DIGITS})"
    rf"|(?P<plain>{_DIGITS})(?:\s*(?:\\times|\\cdot|×|\*)\s*10\s*\^\s*\{{?(?P<power>[+-]?[0-9]{{1,3}})\}}?"
    rf"|[eE](?P<exponent>[+-]?[0-9]{{1,3}}))?(?![0-9]))"
)
_UNITS = re.compile(r"\\?%|\\?\$|[€£¥°]|\^\{?\\circ\}?|\\degree\b|(?<=[A-Za-z])\s*\^\s*\{?-?[0-9]\}?|\\[,;:! ]|~")
_FORMULA = re.compile(r"[\\^_*+/(){}\[\]<>√π!]|\bpi\b|sqrt")


@functools.lru_cache(maxsize=4096)
def number_in(answer: Answer) -> Fraction | None:
    """The one number that an answer holds, units, percent signs and what stands before "=" left out; exact.

    None where there are several numbers or none, or where the number is a part of a formula (`3\\pi`).
    """
    text = re.split(r"=|\\approx(?![a-z])|≈", answer.latex)[-1].replace("−", "-").replace("{,}", ",")
    text = _UNITS.sub(" ", unfont(text))
    found = list(_NUMBER.finditer(text))
    if len(found) != 1:
        return None
    before, after = text[: found[0].start()], text[found[0].end() :]
    if _FORMULA.search(f"{before} {after}") or re.match(r"[.,]?[0-9]|[eE][+-]?[0-9]", after):
        return None
    parts = {name: value.replace(",", "") for name, value in found[0].groupdict().items() if value}
    if "over" in parts:
        value = _ratio(parts["over"], parts["under"])
        value = None if value is None else value + Fraction(parts.get("whole", "0"))
    elif "top" in parts:
        value = _ratio(parts["top"], parts["bottom"])
    else:
        value = Fraction(parts["plain"].rstrip(".")) * Fraction(10) ** int(
            parts.get("power") or parts.get("exponent") or 0
        )
    return value if value is None or parts.get("sign") != "-" else -value


def _ratio(over: str, under: str) -> Fraction | None:
    bottom = Fraction(under.rstrip("."))
    return Fraction(over.rstrip(".")) / bottom if bottom else None


def _plain(text: str) -> str:
    """A text as `text` compares it: the last box's content where there is one, white space evened out."""
    boxes = boxes_in(text)
    text = boxes[-1][2] if boxes else text.strip().strip("$")
    return " ".join(unicodedata.normalize("NFC", unfont(text)).split())
