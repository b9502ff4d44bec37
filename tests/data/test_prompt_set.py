"""Every row of a prompt file is used or skipped with its reason; the order is a function of seed and epoch."""

import json

import pytest

from lmmr1_jax.data.prompt_files import read_rows
from lmmr1_jax.data.prompt_set import PromptCursor, prompts_from_rows, read_prompts, split_holdout
from lmmr1_jax.data.skips import SkipLog
from lmmr1_jax.runtime.errors import UserError


def row(text="How many?", answer="$3$", **more):
    return {"message": json.dumps([{"role": "user", "content": text}]), "answer": answer, **more}


def write_jsonl(path, lines):
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return path


def test_every_broken_line_is_skipped_with_its_number_and_reason(tmp_path):
    lines = [
        row(),
        b'{"message": "[{\\"role\\"',
        b"\xff\xfe not utf-8",
        b"[1, 2]",
        b"",
        {"answer": "3"},
        row(answer=None),
        row(text="a <|image_pad|> b"),
        {"message": "not json", "answer": "3"},
        row(text="the last"),
    ]
    path, skips = write_jsonl(tmp_path / "set.jsonl", lines), SkipLog()
    prompts = read_prompts(path, special_tokens=["<|image_pad|>"], skips=skips)
    assert [(p.row, p.messages[0]["content"]) for p in prompts] == [(0, "How many?"), (9, "the last")]
    assert [(r["row"], r["reason"]) for r in skips.records] == [
        (1, "bad_json"),
        (2, "bad_json"),
        (3, "bad_json"),
        (5, "no_message"),
        (6, "no_answer"),
        (7, "special_token_in_text"),
        (8, "bad_json"),
    ]
    assert all(r["file"] == str(path) and r["detail"] for r in skips.records)


def test_the_three_formats_give_the_same_prompts(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    rows = [row(f"question {i}", str(i), id=f"q{i}", data_source="made") for i in range(5)]
    write_jsonl(tmp_path / "set.jsonl", rows)
    (tmp_path / "set.json").write_text(json.dumps(rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "set.parquet")
    read = [read_prompts(tmp_path / f"set.{kind}", skips=SkipLog()) for kind in ("jsonl", "json", "parquet")]
    plain = [[(p.messages, p.label, p.prompt_id, p.data_source, p.row) for p in prompts] for prompts in read]
    assert plain[0] == plain[1] == plain[2] and len(plain[0]) == 5
    assert plain[0][2][1:] == ("2", "q2", "made", 2)


def test_nested_parquet_columns_are_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    parts = [{"type": "text", "text": "look"}, {"type": "image", "image": "a.png"}]
    rows = [{"conversation": [{"role": "user", "content": parts}], "solution": 3}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "set.parquet")
    (prompt,) = read_prompts(
        tmp_path / "set.parquet", prompt_key="conversation", answer_key="solution", skips=SkipLog()
    )
    assert prompt.messages == [{"role": "user", "content": parts}] and prompt.label == "3"


def test_answers_are_optional_where_no_gold_is_needed(tmp_path):
    path = write_jsonl(tmp_path / "set.jsonl", [{"message": row()["message"]}, row()])
    prompts = read_prompts(path, need_answer=False, skips=SkipLog())
    assert [p.label for p in prompts] == [None, "$3$"]


def test_prompt_ids_are_unique_even_when_the_file_repeats_them(tmp_path):
    path = write_jsonl(tmp_path / "set.jsonl", [row(id=7), row(id=7), row()])
    assert [p.prompt_id for p in read_prompts(path, skips=SkipLog())] == ["7", "7#1", "2"]


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("missing.jsonl", None, "no such prompt file"),
        ("set.csv", b"a,b", "end in"),
        ("set.json", b"[{", "not JSON"),
        ("set.json", b'{"message": []}', "list of rows"),
        ("set.jsonl", b"", "no row can be used"),
        ("set.jsonl", b"{\n{\n", "2 bad_json"),
        ("set.parquet", b"PAR1 nothing", "not parquet"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line_that_names_it(tmp_path, name, content, words):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_prompts(path, skips=SkipLog())
    assert words in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_blank_lines_are_counted_but_not_given(tmp_path):
    (tmp_path / "set.jsonl").write_text('\n{"a": 1}\n\n{"a": 2}\n')
    assert list(read_rows(tmp_path / "set.jsonl")) == [(1, {"a": 1}), (3, {"a": 2})]


def made_prompts(count):
    rows = [(i, row(f"question {i}")) for i in range(count)]
    return prompts_from_rows(rows, file="made", skips=SkipLog())


@pytest.mark.parametrize("count, held_out", [(5, 0), (10, 1), (1000, 100), (5000, 256)])
def test_the_last_tenth_but_at_most_256_rows_are_held_out(count, held_out):
    prompts = made_prompts(count)
    train, test = split_holdout(prompts)
    assert len(test) == held_out and train + test == prompts


def test_every_epoch_shows_every_prompt_once_in_an_order_of_its_own():
    prompts = made_prompts(50)
    cursor = PromptCursor(prompts, seed=3)
    epochs = [[cursor.next().row for _ in range(50)] for _ in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    again = PromptCursor(prompts, seed=3)
    assert [again.next().row for _ in range(50)] == epochs[0]
    other = PromptCursor(prompts, seed=4)
    assert [other.next().row for _ in range(50)] != epochs[0]


def test_without_shuffling_the_order_is_the_file_order():
    cursor = PromptCursor(made_prompts(7), seed=0, shuffle=False)
    assert [cursor.next().row for _ in range(10)] == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2]


@pytest.mark.parametrize("drawn", [0, 1, 6, 7, 8, 20])
def test_a_restored_cursor_goes_on_as_the_first_would_have(drawn):
    prompts = made_prompts(7)
    first, second = PromptCursor(prompts, seed=1), PromptCursor(prompts, seed=1)
    for _ in range(drawn):
        first.next()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [first.next().row for _ in range(20)] == [second.next().row for _ in range(20)]


def test_a_cursor_refuses_the_state_of_another_prompt_set():
    state = PromptCursor(made_prompts(7), seed=1).state_dict()
    with pytest.raises(UserError, match="same data"):
        PromptCursor(made_prompts(8), seed=1).load_state_dict(state)
