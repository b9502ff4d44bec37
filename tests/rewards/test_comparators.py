"""The right verifier per problem: what each accepts, and who chooses it."""

import dataclasses
from fractions import Fraction

import pytest

from lmmr1_jax.config.schema import RewardsConfig
from lmmr1_jax.data.skips import SkipLog
from lmmr1_jax.rewards.rules.answers import read_block
from lmmr1_jax.rewards.rules.assignment import check_sources, choose, read_name, readable
from lmmr1_jax.rewards.rules.comparators import is_comparable, is_right, number_in, option_in
from lmmr1_jax.rewards.rules.grading import grade
from lmmr1_jax.rewards.rules.service import Verifier
from lmmr1_jax.runtime.errors import UserError
from lmmr1_jax.types.records import Prompt

NUMBERS = {
    "60": Fraction(60),
    "The answer is 60.": Fraction(60),
    r"$\boxed{1{,}234.50}$": Fraction(2469, 2),
    "70,000": Fraction(70000),
    r"$x=\frac12$": Fraction(1, 2),
    r"$2\frac{1}{2}$": Fraction(5, 2),
    r"$-\frac{3}{4}$": Fraction(-3, 4),
    "12%": Fraction(12),
    r"$5\text{ cm}^2$": Fraction(5),
    r"\$18": Fraction(18),
    r"90^\circ": Fraction(90),
    r"$3.0 \times 10^{8}$": Fraction(300_000_000),
    "1e3": Fraction(1000),
    "1/3": Fraction(1, 3),
    "There are 12 apples": Fraction(12),
}
NO_NUMBER = ["", "many", r"3\pi", r"\sqrt{3}", "12 or 13", r"$\boxed{1}$ and $\boxed{2}$", "1/0", "2-3", "5!", "1.2.3"]


@pytest.mark.parametrize("text", NUMBERS)
def test_a_number_is_read_exactly_however_it_is_written(text):
    assert number_in(read_block(text)) == NUMBERS[text]


@pytest.mark.parametrize("text", NO_NUMBER)
def test_several_numbers_none_or_a_formula_are_no_number(text):
    assert number_in(read_block(text)) is None


def test_a_number_may_be_off_by_the_tolerance_that_is_named_and_by_no_more():
    assert is_right("0.5", r"\frac{1}{2}", "number") and not is_right("0.3333", "1/3", "number")
    assert is_right("0.3333", "1/3", "number:0.001") and is_right("105", "100", "number:0.05")
    assert not is_right("106", "100", "number:0.05") and not is_right("-100", "100", "number:0.05")


def test_a_large_exponent_costs_nothing():
    assert number_in(read_block("10^{10^{8}}")) is None and number_in(read_block("1e999999999")) is None


OPTIONS = [("A", "A"), ("(b)", "B"), (r"\text{(C)}", "C"), ("B) because A is wrong", "B"), ("The answer is D.", "D")]
NO_OPTION = [
    "A or B",
    "A, B, C",
    "The answer is A or B",
    r"$\boxed{A}$ $\boxed{B}$",
    "Option A or option B",
    "A. 12, B. 13",
    "A/B",
    "all of them",
    "12",
]


@pytest.mark.parametrize("text, option", OPTIONS)
def test_an_option_is_chosen_in_many_ways(text, option):
    assert option_in(read_block(text)) == option
    assert is_right(text, f"({option})", "choice") and not is_right(text, "E", "choice")


@pytest.mark.parametrize("text", NO_OPTION)
def test_naming_several_options_chooses_none(text):
    assert option_in(read_block(text)) is None


def test_a_gold_option_may_carry_its_text():
    assert is_right("B", "B. 12 cm", "choice") and is_right("(B)", "b", "choice")


def test_text_is_compared_to_the_letter_but_for_white_space_and_boxes():
    assert is_right("  the  quick\nfox ", "the quick fox", "text")
    assert is_right(r"It is $\boxed{\text{the quick fox}}$", "the quick fox", "text")
    assert is_right("caf\u00e9", "cafe\u0301", "text")
    assert not is_right("The quick fox", "the quick fox", "text") and not is_right("1.0", "1", "text")


def test_an_answer_that_the_verifier_cannot_read_is_not_comparable():
    assert [is_comparable("A", kind) for kind in ("math", "number", "choice", "text")] == [True, False, True, True]
    assert [is_comparable("3.5", kind) for kind in ("math", "number", "choice", "text")] == [True, True, False, True]
    assert not is_right("3.5", "3.5", "choice") and not is_comparable("  ", "text")


def test_the_verifier_reaches_the_rules_and_the_pool():
    text = "<think> a </think><answer> x^2 + 2x + 1 </answer>"
    assert grade(text, "(x+1)^2", "default")[0] == 1.0
    assert grade(text, "(x+1)^2", "default", verifier="text")[0] == 0.0
    with Verifier(RewardsConfig(workers=1, verifier="text")) as verifier:
        assert [r.parts["accuracy"] for r in verifier.score([text] * 2, ["(x+1)^2"] * 2, None, ["math", ""])] == [1, 0]
        assert verifier.parsable(["A", "A"], ["number", "choice"]) == [False, True]


@pytest.mark.parametrize("name", ["", "maths", "number:", "number:x", "number:1", "number:-1", "number:nan", "math:1"])
def test_an_unknown_verifier_is_refused_with_the_known_ones(name):
    with pytest.raises(UserError, match="math, number, choice, text"):
        read_name(name)


def prompt(row: int, source: str, verifier: str = "", label: str = "3") -> Prompt:
    return Prompt([], label, str(row), source, "set.jsonl", row, verifier)


def test_the_rows_verifier_comes_before_its_sources_and_that_before_the_runs():
    config = RewardsConfig(verifier="text", verifiers=("geometry=number:0.01", "a=b=choice"))
    prompts = [prompt(0, "geometry", "math"), prompt(1, "geometry"), prompt(2, "a=b"), prompt(3, "else")]
    assert [p.verifier for p in choose(prompts, config)] == ["math", "number:0.01", "choice", "text"]


def test_a_rows_unknown_verifier_is_named_with_file_and_row():
    with pytest.raises(UserError, match="set.jsonl: row 7 has 'kind' 'geo'.*data.verifier_key"):
        choose([prompt(7, "geometry", "geo")], RewardsConfig(), "kind")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"verifier": "maths"}, "rewards.verifier: there is no verifier 'maths'"),
        ({"verifiers": ("geometry=maths",)}, "rewards.verifiers: there is no verifier 'maths'"),
        ({"verifiers": ("geometry",)}, "not SOURCE=VERIFIER"),
        ({"verifiers": ("=math",)}, "not SOURCE=VERIFIER"),
        ({"verifiers": ("a=math", "a=text")}, "stands there twice"),
        ({"variant": "lmm-r1", "verifiers": ("a=text",)}, "judges everything by its own rules"),
    ],
)
def test_a_choice_that_cannot_be_meant_is_one_clear_line(changes, words):
    with pytest.raises(UserError, match=words):
        choose([prompt(0, "a")], dataclasses.replace(RewardsConfig(), **changes))


def test_a_verifier_for_a_data_source_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(UserError, match="'geometri'; the data has counting, geometry"):
        check_sources(RewardsConfig(verifiers=("geometri=math",)), [prompt(0, "geometry"), prompt(1, "counting")])


class CountsQuestions:
    def __init__(self):
        self.asked = []

    def parsable(self, labels, verifiers):
        self.asked += list(zip(labels, verifiers, strict=True))
        return [label != "unreadable" for label in labels]


def test_rows_whose_answers_cannot_be_read_are_skipped_and_equal_answers_asked_once():
    prompts = [prompt(i, "a", "math", "A") for i in range(20)] + [prompt(20, "a", "math", "unreadable")]
    verifier, skips = CountsQuestions(), SkipLog()
    assert readable(prompts, verifier, skips) == prompts[:20]
    assert verifier.asked == [("A", "math"), ("unreadable", "math")]
    assert [(r["row"], r["reason"]) for r in skips.records] == [(20, "unparsable_answer")]
    with pytest.raises(UserError, match="none of the 1 answers"):
        readable(prompts[20:], verifier, skips)
