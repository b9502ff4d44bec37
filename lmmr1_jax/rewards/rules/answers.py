"""Taking an answer out of text, and two answers' comparison as mathematics.

Gold answers are written in many ways and models answer in more: `$\\boxed{60}$`, `60`, `\\frac43`, `(A)`, `#### 60`,
`The answer is A`. Here a text becomes an `Answer`, whose properties say what it may stand for; which of them is
compared is the verifiers' business (`verifiers.py`).

math-verify's own time limits are off: they need SIGALRM, and a handler never runs while a big power holds the
interpreter. Whoever calls this on text that a model wrote does it in a process that can be killed (`pool.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

logging.getLogger("math_verify").setLevel(logging.ERROR)  # else it warns of the limits that we switched off

LONGEST_ANSWER = 2000
"""Characters; a longer answer is wrong without asking the parser (its time grows faster than the text)."""

_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is taken whole, so that it does not count


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer taken out of its text.

    Attributes:
      latex: what math-verify is given, without dollar signs.
      key: the same without spacing and fonts; equal keys are equal answers.
      prose: True where no box and no formula was found and `latex` is a sentence.
    """

    latex: str
    key: str
    prose: bool = False

    @functools.cached_property
    def integer(self) -> int | None:
        """A whole number, with or without commas between the thousands."""
        match = re.fullmatch(r"[+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,200})", self.key)
        return int(match[0].replace(",", "")) if match else None

    @functools.cached_property
    def letter(self) -> str | None:
        """The option that a gold answer names: A, (A), A."""
        match = re.fullmatch(r"[(\[]?([A-Z])[)\]]?\.?", self.key)
        return match[1] if match else None

    @functools.cached_property
    def chosen_letter(self) -> str | None:
        """The option that a completion chose: A, a, (A), "A. 12", "C) none of these", "The answer is A"."""
        text = unfont(self.latex).strip()
        match = re.fullmatch(r"[(\[]?\s*([A-Z])\s*(?:[)\].:].*)?|[(\[]?([a-z])[)\]]?\.?", text, re.DOTALL)
        if match:
            return (match[1] or match[2]).upper()
        named = re.findall(r"(?i:answer|option|choice)(?:\s+(?i:is|are))?\s*:?\s*[(\[]?([A-Z])\b", text)
        return named[-1] if named else None

    @functools.cached_property
    def is_words(self) -> bool:
        """Words, not mathematics: math-verify would read them as a product of their letters, in any order."""
        if re.fullmatch(r"\s*\\(?:text\w*|mathrm|mbox|textbf)\s*\{[^{}]*[A-Za-z][^{}]*\}\s*", self.latex):
            return True
        return bool(re.search(r"[A-Za-z]{3}", self.latex)) and bool(re.fullmatch(r"[A-Za-z\s,.'-]+", self.latex))

    @functools.cached_property
    def parsed(self) -> list[Any]:
        """What math-verify makes of it: a sympy expression and the string it came from, or nothing."""
        if not self.key:
            return []
        if self.prose:
            return parse(self.latex, [ExprExtractionConfig()], parsing_timeout=None)
        return parse(f"${self.latex}$", [LatexExtractionConfig(), ExprExtractionConfig()], parsing_timeout=None)

    @functools.cached_property
    def comparable(self) -> bool:
        """Whether it can be compared with anything, as a gold answer must."""
        if not self.key or not is_balanced(self.latex):
            return False
        if self.letter or self.integer is not None or self.is_words:
            return True
        return any(not isinstance(value, str) for value in self.parsed)


@functools.lru_cache(maxsize=4096)  # the completions of a group often agree
def same(gold: Answer, answer: Answer) -> bool:
    """Whether both are one answer: as letters or words where the gold answer is such, else as mathematics."""
    if gold.key == answer.key:
        return True
    if gold.letter:
        return gold.letter == answer.chosen_letter
    if gold.is_words:
        return gold.key.casefold() == answer.key.casefold()
    if gold.integer is not None and answer.integer is not None:
        return gold.integer == answer.integer
    return bool(answer.parsed) and verify(gold.parsed, answer.parsed, timeout_seconds=None)


@functools.lru_cache(maxsize=4096)
def gold_answer(label: str) -> Answer:
    """Gold answers come as `$\\boxed{60}$`, `$3$`, `60`, `\\frac43`, `A`, `(A)`, or after GSM8K's `####`."""
    text = label.rpartition("####")[2].strip()
    boxes = boxes_in(text)
    if boxes:
        text = boxes[-1][2]
    elif len(text) > 1 and text[0] == text[-1] == "$":
        text = text.strip("$")
    return as_answer(text)


def read_block(block: str) -> Answer:
    """The answer that a block comes to: its last boxes, else its last formula, else its text.

    Boxes that stand side by side (`$\\boxed{1}$ and $\\boxed{2}$`) are one answer with several parts, so that naming
    every candidate is no way to be right.
    """
    boxes = boxes_in(block)
    if boxes:
        parts = [boxes[-1][2]]
        for (_, end, content), (start, _, _) in zip(boxes[-2::-1], boxes[:0:-1], strict=True):
            if not re.fullmatch(r"[\s$,;]*(?:(?:\\text\{\s*)?(?:and|or)\s*\}?)?[\s$,;]*", block[end:start]):
                break
            parts.append(content)
        return as_answer(", ".join(dict.fromkeys(reversed(parts))))
    block = block[-2 * LONGEST_ANSWER :]
    formulas = re.findall(r"\$\$?([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", block, re.DOTALL)
    if formulas:
        return as_answer("".join(formulas[-1]))
    block = re.sub(r"^\*\*([^*]+)\*\*$", r"\1", block)
    if "\\" in block or not re.search(r"[A-Za-z]{2}", block):
        return as_answer(block)
    # "The answer is Evelyn." -> "Evelyn"; a number is found by math-verify wherever it stands in the sentence.
    stem = re.fullmatch(r"(?is).*\banswer\b(?:\s+is)?\s*:?\s+(\S.*)", block)
    return dataclasses.replace(as_answer(stem[1] if stem else block), prose=True)


def boxes_in(text: str) -> list[tuple[int, int, str]]:
    """(start, end, content) of every `\\boxed{...}` and `\\fbox{...}` whose braces close, outermost ones only."""
    found, position = [], 0
    for match in re.finditer(r"\\(?:boxed|fbox)\s*\{", text):
        if match.start() < position:
            continue
        depth = 1
        for brace in _BRACES.finditer(text, match.end()):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                position = brace.end()
                found.append((match.start(), position, text[match.end() : position - 1]))
                break
        else:
            break  # what does not close here closes nowhere further on
    return found


def is_balanced(latex: str) -> bool:
    """Whether every brace closes."""
    depth = 0
    for brace in _BRACES.findall(latex):
        depth += {"{": 1, "}": -1}.get(brace, 0)
        if depth < 0:
            return False
    return depth == 0



def as_answer(text: str) -> Answer:
    """The whole text as an answer; one that is too long is an empty one."""
    if len(text) > LONGEST_ANSWER:
        return Answer("", "")
    latex = with_braces(text.strip().rstrip(".").strip())
    key = unfont(latex)
    key = re.sub(r"\^\{?\s*\\circ\s*\}?|\\degree\b|°", "", key)
    key = re.sub(r"\\(?:left|right|displaystyle|limits|big|Big|bigl|bigr)(?![A-Za-z])|\\[!,;: $]|[\s$~]", "", key)
    return Answer(latex, key.rstrip("."))


def with_braces(latex: str) -> str:
    """TeX's one-token arguments get the braces that parsers want: `\\frac43`, `\\frac{4}3`, `\\sqrt2`, `x^2`."""
    latex = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", latex)
    latex = re.sub(r"\\frac\s*([0-9A-Za-z])\s*(?=[0-9A-Za-z{\\])", r"\\frac{\1}", latex)
    latex = re.sub(r"(\\frac\s*\{[^{}]*\})\s*([0-9A-Za-z])", r"\1{\2}", latex)
    latex = re.sub(r"\\sqrt\s*([0-9A-Za-z])", r"\\sqrt{\1}", latex)
    return re.sub(r"\^\s*([0-9A-Za-z])", r"^{\1}", latex)


def unfont(latex: str) -> str:
    """`\\text{A}` and its like without the command."""
    return re.sub(r"\\(?:text[a-z]*|mathrm|mathbf|mathit|mbox|operatorname)\s*\{([^{}]*)\}", r"\1", latex)
