"""LMM-R1's own `math_verifier` as its last commit had it, flaws included.

No white space between the blocks, the last box of the whole response counts (one inside `<think>` too), math-verify's
arguments are swapped, and a gold answer that can't be parsed rewards everyone.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify

_FORM = re.compile(r"^<think>(?:(?!</think>).)*</think><answer>(?:(?!</answer>).)*</answer>\Z", re.DOTALL)
_GOLD = (LatexExtractionConfig(),)
_ANSWER = (
    LatexExtractionConfig(
        normalization_config=NormalizationConfig(
            nits=False, malformed_operators=False, basic_latex=True, boxed="all", units=True
        ),
        boxed_match_priority=0,
        try_extract_without_anchor=False,
    ),
)


def has_form(text: str) -> bool:
    """LMM-R1's last pattern, which allows nothing between the blocks."""
    return bool(_FORM.match(text)) and text.count("<think>") == 1 and text.count("<answer>") == 1


@functools.lru_cache(maxsize=4096)
def _gold(label: str) -> list[Any]:
    label = label.strip()
    return parse(
        label if label.startswith("$") else f"${label}$",
        _GOLD,
        extraction_mode="first_match",
        parsing_timeout=None,
    )


def accuracy(text: str, label: str) -> float:
    """1.0 for the right answer, and for any answer where the gold one can't be parsed."""
    gold = _gold(label)
    if not gold:
        return 1.0
    answer = parse(text, _ANSWER, extraction_mode="first_match", parsing_timeout=None)
    try:
        return float(verify(answer, gold, timeout_seconds=None))
    except Exception:
        return 0.0
