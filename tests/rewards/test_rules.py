"""Format and accuracy, by hand and on real gold answers."""

import json
from pathlib import Path

import pytest

from lmmr1_jax.rewards.rules.grading import gold_is_parsable, grade, has_form, is_right

DATA = Path(__file__).parents[3] / "shared" / "data"


def answer(block: str) -> str:
    return f"<think> so it is </think><answer> {block} </answer>"


def test_right_form_and_right_answer_count_apart():
    assert grade(answer(r"$\boxed{3}$"), "3", "default") == (1.0, 1.0)
    assert grade(answer(r"$\boxed{4}$"), "3", "default") == (0.0, 1.0)
    assert grade(r"<answer> $\boxed{3}$ </answer>", "3", "default") == (1.0, 0.0)
    assert grade(r"$\boxed{3}$", "3", "default") == (0.0, 0.0)


# (text, form under default, form under lmm-r1); the golden vectors of LMM-R1's last pattern are among them.
FORMS = [
    ("<think>a</think><answer>b</answer>", 1, 1),
    ("<think>a</think>\n<answer>b</answer>", 1, 0),
    (" <think>a</think> <answer>b</answer>\n", 1, 0),
    (" <think>a</think><answer>b</answer>\n", 1, 1),  # white space outside is stripped first
    ("<think>a</think><answer>b</answer> so", 0, 0),
    ("Well: <think>a</think><answer>b</answer>", 0, 0),
    ("<think>a</think>so<answer>b</answer>", 0, 0),
    ("<think>a</think><answer>b</answer><answer>b</answer>", 0, 0),
    ("<think><think>a</think><answer>b</answer>", 0, 0),
    ("<think>a</think></think><answer>b</answer>", 0, 0),
    ("<think>a<answer>b</answer></think>", 0, 0),
    ("<answer>b</answer><think>a</think>", 0, 0),
    ("<think>a</think><answer>b", 0, 0),
    ("<think>a\nb</think><answer>b\nc</answer>", 1, 1),
    ("<think>a</think><answer>b</answer><|im_end|>", 1, 1),
    ("", 0, 0),
]


@pytest.mark.parametrize("text, default, lmm_r1", FORMS)
def test_form_of_both_variants(text, default, lmm_r1):
    assert grade(text, "7", "default")[1] == default
    assert grade(text, "7", "lmm-r1")[1] == lmm_r1


RIGHT = [
    (r"$\boxed{60}$", r"$\boxed{60}$"),
    (r"The answer is $\boxed{60}$", "60"),
    ("$60$", "60"),
    ("60", r"$\boxed{60}$"),
    ("The answer is 60.", "$60$"),
    ("**60**", "60"),
    (r"$\boxed{70000}$", "70,000"),
    (r"$\boxed{\$18}$", "18"),
    (r"$\boxed{18}$", "16 - 3 - 4 = 9, times 2 is #### 18"),
    (r"$\boxed{3.0}$", "3"),
    ("$x = 3$", "3"),
    (r"$\boxed{4/3}$", r"\frac43"),
    (r"$\boxed{\dfrac{4}{3}}$", r"\frac43"),
    (r"$\boxed{\frac43}$", r"\frac{4}{3}"),
    (r"$\boxed{11 \cdot \sqrt{2}}$", r"11\sqrt2"),
    (r"$\boxed{0.5}$", r"\frac12"),
    (r"$\boxed{(x+1)^2}$", "x^2+2x+1"),
    (r"$\boxed{2, 1}$", "1,2"),
    (r"$\boxed{1}$ and $\boxed{2}$", "1,2"),
    (r"$\boxed{\left( 3, \frac{\pi}{2} \right)}$", r"(3,\pi/2)"),
    (r"$\boxed{90^{\circ}}$", "90^\\circ"),
    (r"$\boxed{5 \text{ cm}}$", "5"),
    (r"First $\boxed{1}$, and in the end $\boxed{2}$", "2"),
    (r"\(\frac{1}{2}\)", "0.5"),
    (r"$\boxed{\text{Evelyn}}$", "Evelyn"),
    ("The answer is Evelyn.", r"\text{Evelyn}"),
    (r"$\boxed{A}$", r"$\boxed{A}$"),
    (r"$\boxed{A}$", "(A)"),
    (r"$\boxed{\text{(A)}}$", "A"),
    ("A", "A"),
    ("(a)", "A"),
    ("A. 12", r"\text{(A)}"),
    ("B) because A is wrong", "B"),
    ("The answer is A", "A"),
]
WRONG = [
    (r"$\boxed{61}$", "60"),
    ("-5", "5"),
    ("", "3"),
    ("It is 12 or 13", "12"),
    (r"$\boxed{1}$ and $\boxed{2}$", "2"),
    (r"$\boxed{1}$, $\boxed{2}$", "1"),
    (r"$\boxed{\text{nylevE}}$", "Evelyn"),  # the same letters: one and the same product to math-verify
    (r"$\boxed{B}$", "A"),
    ("The answer is B, not that A is bad", "A"),
    ("A cat", "A"),
    (r"$\boxed{3", "3 "),
    (r"$\boxed{}$", "3"),
]


@pytest.mark.parametrize("block, label", RIGHT)
def test_equal_answers_are_right_however_they_are_written(block, label):
    assert is_right(answer(block), label)


@pytest.mark.parametrize("block, label", WRONG)
def test_other_answers_are_wrong(block, label):
    assert not is_right(answer(block), label)


def test_only_the_answer_block_is_graded():
    text = r"<think> $\boxed{3}$ </think><answer> $\boxed{4}$ </answer>"
    assert grade(text, "4", "default")[0] == 1.0 and grade(text, "3", "default")[0] == 0.0
    thought = r"<think> $\boxed{3}$ </think><answer> no idea </answer>"
    assert grade(thought, "3", "default")[0] == 0.0
    assert grade(thought, "3", "lmm-r1")[0] == 1.0  # their last box stands anywhere


def test_an_answer_that_was_cut_off_is_wrong():
    assert not is_right(r"<think> a </think><answer> $\boxed{3}$", "3")
    assert not is_right(r"</answer> $\boxed{3}$ <answer>", "3")


def test_lmm_r1_rewards_everyone_where_the_gold_answer_cannot_be_parsed():
    assert grade("anything", "$$", "lmm-r1")[0] == 1.0
    assert grade(answer("anything"), "$$", "default")[0] == 0.0
    assert gold_is_parsable("$$", "lmm-r1") and not gold_is_parsable("$$")


def test_lmm_r1_wants_latex():
    assert grade("<think>a</think><answer>60</answer>", "60", "lmm-r1") == (0.0, 1.0)
    assert grade("<think>a</think><answer>$60$</answer>", "60", "lmm-r1") == (1.0, 1.0)
    assert grade(answer(r"$\boxed{\frac{1}{2}}$"), "0.5", "lmm-r1")[0] == 1.0


def test_lmm_r1_grades_the_prompt_where_the_completion_is_empty():
    prompt = r"i.e., <think> Since $1+1=2$ </think><answer> The answer is $\boxed{2}$ </answer>"
    assert grade("<|im_end|>", "2", "lmm-r1", prompt)[0] == 1.0
    assert grade("<|im_end|>", "2", "default", prompt)[0] == 0.0


UNPARSABLE = [
    "",
    "  ",
    "$",
    "$$",
    "???",
    "@#!",
    r"\frac{",
    r"\boxed{}",
    r"$\boxed{$",
    r"\frac{1}{",
    "}{",
    r"\unknown{3}",
    "x =",
]
PARSABLE = [
    "60",
    "$3$",
    r"$\boxed{60}$",
    r"\frac43",
    "A",
    "(A)",
    "Evelyn",
    r"\text{two}",
    "[1,2)",
    r"\infty",
    "x=3",
    "3\\%",
]


def test_gold_answers_that_compare_with_nothing_are_unparsable():
    assert [gold for gold in UNPARSABLE if gold_is_parsable(gold)] == []
    assert [gold for gold in PARSABLE if not gold_is_parsable(gold)] == []


def test_a_gold_answer_that_is_parsable_verifies_against_itself():
    wrapped = [
        grade(f"<think>a</think><answer>$\\boxed{{{gold.strip('$')}}}$</answer>", gold, "default") for gold in PARSABLE
    ]
    assert wrapped == [(1.0, 1.0)] * len(PARSABLE)


@pytest.mark.parametrize("file", ["math500_first250.jsonl", "gsm8k_first200.jsonl"])
def test_every_real_gold_answer_verifies_against_itself_and_not_against_its_neighbour(file):
    if not (DATA / file).exists():
        pytest.skip(f"../shared/data/{file} is absent")
    golds = [json.loads(line)["answer"] for line in (DATA / file).read_text().splitlines()]
    text = "<think>a</think>\n<answer>$\\boxed{%s}$</answer>"
    assert [gold for gold in golds if not gold_is_parsable(gold)] == []
    assert [gold for gold in golds if grade(text % gold, gold, "default") != (1.0, 1.0)] == []
    neighbours = zip(golds, golds[1:], strict=False)
    same = [(gold, other) for gold, other in neighbours if gold != other and is_right(text % other, gold)]
    assert set(same) <= {("5", "x=5")}


def test_text_that_would_cost_a_parser_minutes_is_wrong_at_once():
    for bomb in ("{" * 10**6, "\\(" * 500_000, "\\boxed{" * 140_000, "\\boxed{1}," * 140_000, "answer" + " " * 10**6):
        assert not is_right(f"<answer>{bomb}</answer>", "3")
    assert not has_form("<think>" * 10**5)
