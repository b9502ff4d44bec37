"""LMM-R1's prompt rows: what a row says, brought into one form, or the reason why it cannot be used.

    {"message": "[{\\"role\\": \\"user\\", \\"content\\": [{\\"type\\": \\"text\\", \\"text\\": ...}, ...]}]",
     "answer": "$3$"}

The messages are OpenAI-style, a list or the same list as a JSON string. They leave here with `content` a string, or,
where there are images, a list of `{"type": "text", "text": ...}` and `{"type": "image", "image": REFERENCE}` in the
row's own order. Pixel limits written into an image's entry are ignored: the config decides them for all.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from lmmr1_jax.data.faults import BAD_JSON, NO_ANSWER, NO_MESSAGE, SPECIAL_TOKEN_IN_TEXT, SkipPrompt

Message = dict[str, Any]


def parse_messages(value: Any) -> list[Message]:
    """Brings the row's messages into the one form described above.

    Raises:
      SkipPrompt: `bad_json` for a string that is not JSON, `no_message` where no usable messages are found.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise SkipPrompt(BAD_JSON, f"the messages are a string that is not JSON: {error}") from None
    if not isinstance(value, list) or not value:
        raise SkipPrompt(NO_MESSAGE, "the messages must be a list with at least one message")
    return [_message(message) for message in value]


def parse_answer(value: Any) -> str | None:
    """The gold answer as text, or None where the row has none; numbers count as their digits.

    Raises:
      SkipPrompt: `no_answer` for a value that is neither text nor a number.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise SkipPrompt(NO_ANSWER, f"the answer must be text or a number, not {type(value).__name__}")
    text = str(value)
    _require_unicode(text, "the answer")
    return text


def refuse_special_tokens(messages: Sequence[Message], special_tokens: Iterable[str]) -> None:
    """Refuses text that the tokenizer would read as a control token, such as a literal `<|image_pad|>`.

    Raises:
      SkipPrompt: `special_token_in_text`.
    """
    pieces = list(_texts(messages))
    for token in special_tokens:
        if any(token in piece for piece in pieces):
            raise SkipPrompt(SPECIAL_TOKEN_IN_TEXT, f"the text holds the special token {token}")


def image_references(messages: Sequence[Message]) -> list[str]:
    """Addresses of the images, in order of appearance."""
    return [
        part["image"]
        for message in messages
        if not isinstance(message["content"], str)
        for part in message["content"]
        if part["type"] == "image"
    ]


def without_pixels(value: Any) -> Any:
    """Messages with every `data:` address cut to its head: the pixels would be most of the file."""
    if isinstance(value, str) and value.startswith("data:"):
        return f"{value.split(',', 1)[0]},({len(value)} characters)"
    if isinstance(value, dict):
        return {key: without_pixels(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [without_pixels(item) for item in value]
    return value


def _texts(messages: Sequence[Message]) -> Iterable[str]:
    for message in messages:
        yield message["role"]
        if isinstance(message["content"], str):
            yield message["content"]
        else:
            yield from (part["text"] for part in message["content"] if part["type"] == "text")


def _message(message: Any) -> Message:
    if not isinstance(message, dict):
        raise SkipPrompt(NO_MESSAGE, f"a message must be an object, not {type(message).__name__}")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise SkipPrompt(NO_MESSAGE, "a message has no role")
    _require_unicode(role, "a role")
    if isinstance(content, str):
        _require_unicode(content, "a message")
        return {"role": role, "content": content}
    if not isinstance(content, list):
        raise SkipPrompt(NO_MESSAGE, "a message's content must be text or a list of parts")
    parts = [_part(part) for part in content]
    if all(part["type"] == "text" for part in parts):  # templates of text models take no lists
        return {"role": role, "content": "".join(part["text"] for part in parts)}
    return {"role": role, "content": parts}


def _part(part: Any) -> Message:
    if isinstance(part, str):
        part = {"type": "text", "text": part}
    if not isinstance(part, dict):
        raise SkipPrompt(NO_MESSAGE, f"a part of a message must be an object, not {type(part).__name__}")
    # Columns of parquet files give every part every key, with null where the part has none.
    part = {key: value for key, value in part.items() if value is not None}
    kind = part.get("type")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise SkipPrompt(NO_MESSAGE, "a text part has no text")
        _require_unicode(part["text"], "a text part")
        return {"type": "text", "text": part["text"]}
    if kind in ("image", "image_url"):
        reference = part.get("image", part.get("image_url"))
        if isinstance(reference, dict):
            reference = reference.get("url")
        if not isinstance(reference, str) or not reference:
            raise SkipPrompt(NO_MESSAGE, "an image part has no address")
        return {"type": "image", "image": reference}
    raise SkipPrompt(NO_MESSAGE, f"parts must be of type text, image or image_url, not {kind!r}")


def _require_unicode(text: str, what: str) -> None:
    """JSON may hold half a surrogate pair, which no tokenizer can encode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise SkipPrompt(BAD_JSON, f"{what} holds half a surrogate pair, which is not Unicode text") from None
