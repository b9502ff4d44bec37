"""The rules a completion is rewarded by: is it in the right form, and is its answer right.

Two variants. `default` grades the `<answer>` block only, by the verifier that its problem names (`comparators.py`), and
allows white space between the blocks. `lmm-r1` is LMM-R1's own `math_verifier` (`lmm_r1.py`), which has one verifier.

This runs on text that a model wrote, in processes that can be killed (`pool.py`): it imports neither jax nor anything
that does.
"""

from __future__ import annotations

from lmmr1_jax.rewards.rules import comparators as verifiers
from lmmr1_jax.rewards.rules import lmm_r1

END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<｜end▁of▁sentence｜>", "<end_of_turn>")
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def grade(text: str, label: str, variant: str, prompt: str = "", verifier: str = "math") -> tuple[float, float]:
    """(accuracy, format), each 0.0 or 1.0; a verifier of one's own may give an accuracy between the two.

    Args:
      text: the completion as it was decoded, with or without its end token.
      label: the gold answer as the prompt file has it.
      variant: "default" or "lmm-r1".
      prompt: the prompt as text. Only `lmm-r1` reads it, and only for an empty completion: LMM-R1 then grades the
        prompt itself, whose example holds a box with the answer 2.
      verifier: "math", "number", "choice", "text", or one that `comparators.load_own` has loaded; only `default`
        reads it.
    """
    for token in END_TOKENS:
        text = text.replace(token, "")
    text = text.strip()
    if variant == "lmm-r1":
        text = text or prompt
        return lmm_r1.accuracy(text, label), float(lmm_r1.has_form(text))
    return float(is_right(text, label, verifier)), float(has_form(text))


def gold_is_parsable(answer: str, variant: str = "default", verifier: str = "math") -> bool:
    """Whether a gold answer can be compared with anything. `lmm-r1` keeps the rows whose answers can't.

    Has no time limit; `Verifier.parsable` asks the same within one.
    """
    return variant == "lmm-r1" or verifiers.is_comparable(str(answer), verifier)


def has_form(text: str) -> bool:
    """One think block, then one answer block, nothing but white space around them; each tag exactly once."""
    text = text.strip()
    if any(text.count(tag) != 1 for tag in TAGS) or not text.startswith("<think>") or not text.endswith("</answer>"):
        return False
    between = text.partition("</think>")[2].partition("<answer>")
    return bool(between[1]) and not between[0].strip()


def is_right(text: str, label: str, verifier: str = "math") -> bool | float:
    """Whether the last `<answer>` block gives the gold answer; a response without a closed one is wrong."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    if end < 0 or start < 0:
        return False
    return verifiers.is_right(text[start + len("<answer>") : end].strip(), label, verifier)
