"""Why a row of the prompt set cannot be used: the reasons in `skipped.jsonl`, and the exceptions that carry them."""

from __future__ import annotations

BAD_JSON = "bad_json"
NO_MESSAGE = "no_message"
NO_ANSWER = "no_answer"
UNPARSABLE_ANSWER = "unparsable_answer"
SPECIAL_TOKEN_IN_TEXT = "special_token_in_text"
TEMPLATE_FAILED = "template_failed"
MISSING_IMAGE = "missing_image"
BROKEN_IMAGE = "broken_image"
EXTREME_IMAGE = "extreme_image"
FORBIDDEN_PATH = "forbidden_path"
PROMPT_TOO_LONG = "prompt_too_long"
IMAGE_IN_TEXT_MODEL = "image_in_text_model"
TOO_MANY_IMAGES = "too_many_images"

REASONS = (
    BAD_JSON,
    NO_MESSAGE,
    NO_ANSWER,
    UNPARSABLE_ANSWER,
    SPECIAL_TOKEN_IN_TEXT,
    TEMPLATE_FAILED,
    MISSING_IMAGE,
    BROKEN_IMAGE,
    EXTREME_IMAGE,
    FORBIDDEN_PATH,
    PROMPT_TOO_LONG,
    IMAGE_IN_TEXT_MODEL,
    TOO_MANY_IMAGES,
)


class SkipPrompt(Exception):
    """A row that cannot be used: it is skipped, counted and written down, and never ends a run.

    Attributes:
      reason: one of `REASONS`.
      detail: one line for the person who will mend the row.
    """

    def __init__(self, reason: str, detail: str):
        if reason not in REASONS:
            raise ValueError(f"unknown reason {reason!r}")
        self.reason = reason
        self.detail = " ".join(detail.split())
        super().__init__(f"{reason}: {self.detail}")


class ImageFault(SkipPrompt):
    """An image that cannot be had or cannot be used; its prompt is skipped."""
