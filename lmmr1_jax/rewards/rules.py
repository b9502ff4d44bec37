"""The rules a completion is rewarded by: is it in the right form, and is its answer right.

Two variants. `default` grades the `<answer>` block only, hands the gold answer to math-verify first, and allows white
space between the blocks. `lmm-r1` is LMM-R1's `math_verifier` as its last commit had it, flaws included: no white space
between the blocks, the last box of the whole response counts (one inside `<think>` too), math-verify's arguments are
swapped, and a gold answer that can't be parsed rewards everyone.

math-verify's own time limits are off: they need SIGALRM, and a handler never runs while a big power holds the
interpreter. Whoever calls this on text that a model wrote does it in a process that can be killed (`pool.py`).
This module runs in those processes: it imports neither jax nor anything that does.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from typing import Any

from latex2sympy2_extended import NormalizationConfig
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

logging.getLogger("math_verify").setLevel(logging.ERROR)  # else it warns of the limits that we switched off

END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<｜end▁of▁sentence｜>", "<end_of_turn>")
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
LONGEST_ANSWER = 2000
"""Characters; a longer answer is wrong without asking the parser (its time grows faster than the text)."""

_LMM_R1_FORM = re.compile(r"^<think>(?:(?!</think>).)*</think><answer>(?:(?!</answer>).)*</answer>\Z", re.DOTALL)
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is taken whole, so that it does not count


def grade(text: str, label: str, variant: str, prompt: str = "") -> tuple[float, float]:
    """(accuracy, format), each 0.0 or 1.0.

    Args:
      text: the completion as it was decoded, with or without its end token.
      label: the gold answer as the prompt file has it.
      variant: "default" or "lmm-r1".
      prompt: the prompt as text. Only `lmm-r1` reads it, and only for an empty completion: LMM-R1 then grades the
        prompt itself, whose example holds a box with the answer 2.
    """
    for token in END_TOKENS:
        text = text.replace(token, "")
    text = text.strip()
    if variant == "lmm-r1":
        text = text or prompt
        return _lmm_r1_accuracy(text, label), float(_lmm_r1_form(text))
    return float(is_right(text, label)), float(has_form(text))


def gold_is_parsable(answer: str, variant: str = "default") -> bool:
    """Whether a gold answer can be compared with anything. `lmm-r1` keeps the rows whose answers can't.

    Has no time limit; `Verifier.parsable` asks the same within one.
    """
    return variant == "lmm-r1" or _gold(str(answer)).comparable


def has_form(text: str) -> bool:
    """One think block, then one answer block, nothing but white space around them; each tag exactly once."""
    text = text.strip()
    if any(text.count(tag) != 1 for tag in TAGS) or not text.startswith("<think>") or not text.endswith("</answer>"):
        return False
    between = text.partition("</think>")[2].partition("<answer>")
    return bool(between[1]) and not between[0].strip()


def is_right(text: str, label: str) -> bool:
    """Whether the last `<answer>` block gives the gold answer; a response without a closed one is wrong."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    if end < 0 or start < 0:
        return False
    gold = _gold(label)
    return gold.comparable and _same(gold, _read_block(text[start + len("<answer>") : end].strip()))


# ------------------------------------------------------------------------------------------------- reading answers


@dataclasses.dataclass(frozen=True)
class _Answer:
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
        text = _unfont(self.latex).strip()
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
        if not self.key or not _is_balanced(self.latex):
            return False
        if self.letter or self.integer is not None or self.is_words:
            return True
        return any(not isinstance(value, str) for value in self.parsed)


@functools.lru_cache(maxsize=4096)  # the completions of a group often agree
def _same(gold: _Answer, answer: _Answer) -> bool:
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
def _gold(label: str) -> _Answer:
    """Gold answers come as `$\\boxed{60}$`, `$3$`, `60`, `\\frac43`, `A`, `(A)`, or after GSM8K's `####`."""
    text = label.rpartition("####")[2].strip()
    boxes = _boxes(text)
    if boxes:
        text = boxes[-1][2]
    elif len(text) > 1 and text[0] == text[-1] == "$":
        text = text.strip("$")
    return _answer(text)


def _read_block(block: str) -> _Answer:
    """The answer that a block comes to: its last boxes, else its last formula, else its text.

    Boxes that stand side by side (`$\\boxed{1}$ and $\\boxed{2}$`) are one answer with several parts, so that naming
    every candidate is no way to be right.
    """
    boxes = _boxes(block)
    if boxes:
        parts = [boxes[-1][2]]
        for (_, end, content), (start, _, _) in zip(boxes[-2::-1], boxes[:0:-1], strict=True):
            if not re.fullmatch(r"[\s$,;]*(?:(?:\\text\{\s*)?(?:and|or)\s*\}?)?[\s$,;]*", block[end:start]):
                break
            parts.append(content)
        return _answer(", ".join(dict.fromkeys(reversed(parts))))
    block = block[-2 * LONGEST_ANSWER :]
    formulas = re.findall(r"\$\$?([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", block, re.DOTALL)
    if formulas:
        return _answer("".join(formulas[-1]))
    block = re.sub(r"^\*\*([^*]+)\*\*$", r"\1", block)
    if "\\" in block or not re.search(r"[A-Za-z]{2}", block):
        return _answer(block)
    # "The answer is Evelyn." -> "Evelyn"; a number is found by math-verify wherever it stands in the sentence.
    stem = re.fullmatch(r"(?is).*\banswer\b(?:\s+is)?\s*:?\s+(\S.*)", block)
    return dataclasses.replace(_answer(stem[1] if stem else block), prose=True)


def _boxes(text: str) -> list[tuple[int, int, str]]:
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


def _is_balanced(latex: str) -> bool:
    depth = 0
    for brace in _BRACES.findall(latex):
        depth += {"{": 1, "}": -1}.get(brace, 0)
        if depth < 0:
            return False
    return depth == 0


# ---------------------------------------------------------------------------------------------- normalising strings


def _answer(text: str) -> _Answer:
    if len(text) > LONGEST_ANSWER:
        return _Answer("", "")
    latex = _brace(text.strip().rstrip(".").strip())
    key = _unfont(latex)
    key = re.sub(r"\^\{?\s*\\circ\s*\}?|\\degree\b|°", "", key)
    key = re.sub(r"\\(?:left|right|displaystyle|limits|big|Big|bigl|bigr)(?![A-Za-z])|\\[!,;: $]|[\s$~]", "", key)
    return _Answer(latex, key.rstrip("."))


def _brace(latex: str) -> str:
    """TeX's one-token arguments get the braces that parsers want: `\\frac43`, `\\frac{4}3`, `\\sqrt2`, `x^2`."""
    latex = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", latex)
    latex = re.sub(r"\\frac\s*([0-9A-Za-z])\s*(?=[0-9A-Za-z{\\])", r"\\frac{\1}", latex)
    latex = re.sub(r"(\\frac\s*\{[^{}]*\})\s*([0-9A-Za-z])", r"\1{\2}", latex)
    latex = re.sub(r"\\sqrt\s*([0-9A-Za-z])", r"\\sqrt{\1}", latex)
    return re.sub(r"\^\s*([0-9A-Za-z])", r"^{\1}", latex)


def _unfont(latex: str) -> str:
    return re.sub(r"\\(?:text[a-z]*|mathrm|mathbf|mathit|mbox|operatorname)\s*\{([^{}]*)\}", r"\1", latex)


# ------------------------------------------------------------------------------------------------ LMM-R1's own rules

_LMM_R1_GOLD = (LatexExtractionConfig(),)
_LMM_R1_ANSWER = (
    LatexExtractionConfig(
        normalization_config=NormalizationConfig(
            nits=False, malformed_operators=False, basic_latex=True, boxed="all", units=True
        ),
        boxed_match_priority=0,
        try_extract_without_anchor=False,
    ),
)


def _lmm_r1_form(text: str) -> bool:
    return bool(_LMM_R1_FORM.match(text)) and text.count("<think>") == 1 and text.count("<answer>") == 1


@functools.lru_cache(maxsize=4096)
def _lmm_r1_gold(label: str) -> list[Any]:
    label = label.strip()
    return parse(
        label if label.startswith("$") else f"${label}$",
        _LMM_R1_GOLD,
        extraction_mode="first_match",
        parsing_timeout=None,
    )


def _lmm_r1_accuracy(text: str, label: str) -> float:
    gold = _lmm_r1_gold(label)
    if not gold:
        return 1.0
    answer = parse(text, _LMM_R1_ANSWER, extraction_mode="first_match", parsing_timeout=None)
    try:
        return float(verify(answer, gold, timeout_seconds=None))
    except Exception:
        return 0.0
