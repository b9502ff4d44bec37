"""generate, score and evaluate as a person calls them: files in, files out, one line for what is wrong."""

import base64
import io
import json
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("torch")

import oracle

from lmmr1_jax import evaluate, generate, score
from lmmr1_jax.runtime.errors import UserError

MAX_NEW = 8


@pytest.fixture(scope="module")
def model() -> str:
    return str(oracle.random_model("qwen2_5_vl", True))


def image_message(size: int = 84) -> list:
    file = io.BytesIO()
    oracle.random_image(size, size).save(file, "PNG")
    address = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    parts = [{"type": "text", "text": "How many red circles?"}, {"type": "image", "image": address}]
    return [{"role": "user", "content": parts}]


def text_message(text: str) -> list:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """Good and bad lines, one of each kind."""
    lines = [
        json.dumps({"message": text_message("Find x."), "answer": "3"}),
        json.dumps({"message": json.dumps(image_message()), "answer": "$\\boxed{5}$", "data_source": "circles"}),
        "{not json",
        json.dumps({"answer": "3"}),
        json.dumps({"message": text_message("a literal <|image_pad|>"), "answer": "3"}),
        json.dumps({"message": [{"role": "user", "content": [{"type": "image", "image": "gone.png"}]}], "answer": "1"}),
        json.dumps({"message": text_message("One more."), "answer": "3"}),
    ]
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def read_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def generated(model, data, tmp_path_factory) -> list[dict]:
    out = tmp_path_factory.mktemp("out") / "deeper" / "out.jsonl"
    arguments = ["--n", "2", "--max-new-tokens", str(MAX_NEW), "--temperature", "0.9", "--seed", "4"]
    generate.main(["--model", model, "--data", data, "--out", str(out), *arguments])
    return read_lines(out)


def test_generate_writes_a_line_per_input_line(generated):
    assert [line["index"] for line in generated] == list(range(7))
    errors = {line["index"]: line["error"].split(":")[0] for line in generated if "error" in line}
    assert errors == {2: "bad_json", 3: "no_message", 4: "special_token_in_text", 5: "missing_image"}
    for line in (generated[index] for index in (0, 1, 6)):
        assert set(line) == {"index", "prompt_token_ids", "completions"} and len(line["completions"]) == 2
        for completion in line["completions"]:
            assert set(completion) == {"text", "token_ids", "logprobs", "finish_reason"}
            assert 1 <= len(completion["token_ids"]) == len(completion["logprobs"]) <= MAX_NEW
            assert completion["finish_reason"] in ("stop", "length")
    assert generated[1]["prompt_token_ids"].count(oracle.token_id("<|image_pad|>")) == 9


def test_score_agrees_with_what_generate_wrote(model, data, generated, tmp_path):
    """Model log-probs of the generated ids by transformers, through the files alone."""
    text = open(data).read().splitlines()
    rows = {index: json.loads(text[index]) for index in (0, 6)}
    path, out = tmp_path / "pairs.jsonl", tmp_path / "scores.jsonl"
    pairs = [rows[i] | {"completion_ids": generated[i]["completions"][0]["token_ids"]} for i in rows]
    pairs += [rows[0] | {"completion": "the sum is 5"}, rows[0], rows[0] | {"completion_ids": [1, 9999]}]
    pairs += [rows[0] | {"completion": ""}, rows[0] | {"completion": "half a pair: \ud800"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    score.main(["--model", model, "--data", str(path), "--out", str(out)])
    lines = read_lines(out)
    network = oracle.load_model(oracle.random_model("qwen2_5_vl", True))
    for line in lines[:3]:
        expected = oracle.hf_log_probs(network, line["prompt_token_ids"], line["completion_ids"])
        np.testing.assert_allclose(line["logprobs"], expected, atol=1e-4)
    text_ids = oracle.build_tokenizer()("the sum is 5", add_special_tokens=False)["input_ids"]
    assert lines[2]["completion_ids"] == text_ids  # as it stands, nothing appended
    assert lines[3]["error"].startswith("no_completion") and lines[4]["error"].startswith("bad_completion_ids")
    assert lines[5]["completion_ids"] == [] and lines[5]["logprobs"] == []
    assert lines[6]["error"].startswith("bad_completion")


def test_evaluate_counts_prompts_by_source_and_skips_by_reason(model, data, tmp_path):
    out = tmp_path / "result.json"
    arguments = ["--n", "2", "--k", "2", "--max-new-tokens", "4", "--temperature", "1", "--workers", "1"]
    evaluate.main(["--model", model, "--data", data, "--out", str(out), *arguments])
    result = json.loads(out.read_text())
    assert result["n"] == result["k"] == 2
    assert set(result["overall"]) == {"pass@1", "pass@k", "format", "prompts"}
    assert {name: source["prompts"] for name, source in result["sources"].items()} == {"circles": 1, "prompts": 2}
    assert result["skipped"] == {"bad_json": 1, "no_message": 1, "special_token_in_text": 1, "missing_image": 1}


@pytest.mark.parametrize(
    ("command", "arguments", "said"),
    [
        (generate, ["--temperature", "-1"], "--temperature: must be a number from 0"),
        (generate, ["--top-p", "0"], "--top-p: must be"),
        (generate, ["--n", "0"], "--n: must be a whole number from 1"),
        (generate, ["--colour", "red"], "unrecognized arguments: --colour"),
        (evaluate, ["--k", "3", "--n", "2"], "--k 3 must be at most --n 2"),
        (score, ["--model", "no/such/folder"], "no such folder"),
    ],
)
def test_wrong_arguments_are_one_line(model, data, tmp_path, command, arguments, said):
    with pytest.raises(UserError, match=said):
        command.main(["--model", model, "--data", data, "--out", str(tmp_path / "out"), *arguments])
    assert not (tmp_path / "out").exists()


def test_a_missing_data_file_ends_with_status_2_and_no_traceback(model, tmp_path):
    command = [sys.executable, "-m", "lmmr1_jax.score", "--model", model, "--data", "gone.jsonl", "--out"]
    run = subprocess.run([*command, str(tmp_path / "out")], capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.strip().splitlines()[-1] == "error: --data gone.jsonl: no such file"
    assert "Traceback" not in run.stderr and not (tmp_path / "out").exists()
