"""Rows of LMM-R1's format come out in one form; rows that cannot be used come out with their reason."""

import json

import pytest

from lmmr1_jax.data.faults import SkipPrompt
from lmmr1_jax.data.messages import image_references, parse_answer, parse_messages, refuse_special_tokens

PARTS = [{"type": "text", "text": "How many?"}, {"type": "image", "image": "a.png"}]


def reason(call, *args):
    with pytest.raises(SkipPrompt) as caught:
        call(*args)
    assert "\n" not in caught.value.detail
    return caught.value.reason


def test_a_string_and_a_list_give_the_same_messages():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PARTS}]
    assert parse_messages(messages) == parse_messages(json.dumps(messages)) == messages


def test_images_keep_their_order_and_every_spelling_of_an_address_is_read():
    content = [
        {"type": "image", "image": "1.png", "max_pixels": 5},
        {"type": "text", "text": "and"},
        {"type": "image_url", "image_url": {"url": "2.png"}},
        {"type": "image_url", "image_url": "3.png"},
    ]
    messages = parse_messages([{"role": "user", "content": content}])
    assert image_references(messages) == ["1.png", "2.png", "3.png"]
    assert [part["type"] for part in messages[0]["content"]] == ["image", "text", "image", "image"]
    assert messages[0]["content"][0] == {"type": "image", "image": "1.png"}


def test_parts_that_are_all_text_become_one_string():
    content = [{"type": "text", "text": "a"}, "b", {"type": "text", "text": "c"}]
    assert parse_messages([{"role": "user", "content": content}]) == [{"role": "user", "content": "abc"}]


def test_keys_that_are_null_as_in_parquet_columns_are_as_if_absent():
    content = [
        {"type": "text", "text": "a", "image": None, "image_url": None},
        {"type": "image", "text": None, "image": None, "image_url": {"url": "x.png"}},
    ]
    assert image_references(parse_messages([{"role": "user", "content": content}])) == ["x.png"]


@pytest.mark.parametrize("value", ["not json", "[{]", "[" * 100_000, '[{"role": "user", "content": "\\ud800"}]'])
def test_text_that_cannot_be_read_is_bad_json(value):
    assert reason(parse_messages, value) == "bad_json"


@pytest.mark.parametrize(
    "value",
    [
        [],
        "[]",
        "{}",
        5,
        ["hello"],
        [{"content": "no role"}],
        [{"role": "user"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": [{"type": "image"}]}],
        [{"role": "user", "content": [{"type": "image", "image": {"bytes": "x"}}]}],
        [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}],
        [{"role": "user", "content": [7]}],
    ],
)
def test_messages_of_another_shape_are_no_message(value):
    assert reason(parse_messages, value) == "no_message"


@pytest.mark.parametrize("value, text", [("$3$", "$3$"), (3, "3"), (0.5, "0.5"), (None, None), ("  ", None)])
def test_answers_are_text_numbers_or_absent(value, text):
    assert parse_answer(value) == text


@pytest.mark.parametrize("value", [True, ["3"], {"a": 1}])
def test_other_answers_are_no_answer(value):
    assert reason(parse_answer, value) == "no_answer"


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "what is <|image_pad|>?"}],
        [{"role": "user", "content": [{"type": "text", "text": "a<|im_end|>b"}]}],
        [{"role": "<|im_start|>", "content": "x"}],
    ],
)
def test_text_that_would_be_read_as_a_control_token_is_refused(messages):
    assert reason(refuse_special_tokens, messages, ["<|image_pad|>", "<|im_end|>", "<|im_start|>"]) == (
        "special_token_in_text"
    )


def test_a_special_token_in_an_image_address_is_no_text():
    refuse_special_tokens([{"role": "user", "content": [{"type": "image", "image": "<|im_end|>.png"}]}], ["<|im_end|>"])
