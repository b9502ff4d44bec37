"""A comparison of one's own, in a file outside the package, judges in the verifier's workers, within their limits."""

import re
from pathlib import Path

import pytest

from lmmr1_jax.config.schema import RewardsConfig
from lmmr1_jax.rewards.rules.assignment import by_source, choose
from lmmr1_jax.rewards.rules.service import Verifier
from lmmr1_jax.runtime.errors import UserError
from lmmr1_jax.types.records import Prompt

OWN = """
import os, time
from neighbour import WORD
print("loaded")
with open(os.path.join(os.path.dirname(__file__), f"loaded-{os.getpid()}"), "a") as file:
    file.write("once\\n")


def same(answer: str, gold: str) -> bool | float:
    if answer == "hang":
        time.sleep(60)
    if answer == "die":
        os._exit(3)
    if answer == "memory":
        bytearray(8 << 30)
    if answer == "text":
        return "yes"
    if answer == "many":
        return 2.0
    if answer == "half":
        return 0.5
    if answer == "raise":
        raise RuntimeError("no opinion")
    return (answer, gold) == (WORD, "$\\\\boxed{key}$ ")


def one(answer):
    return True


number = 3
"""


@pytest.fixture
def file(tmp_path) -> str:
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "neighbour.py").write_text("WORD = '\\\\boxed{word}'")
    return str(tmp_path / "own.py")


def answered(content: str) -> str:
    return f"<think>so</think><answer> {content} </answer>"


def test_it_gets_block_and_gold_as_they_are_and_its_faults_are_its_completions_own(file):
    contents = ["\\boxed{word}", "hang", "half", "die", "wrong", "text", "raise", "memory", "many", "\\boxed{word}"]
    config = RewardsConfig(workers=2, timeout=2.0, verifier=f"{file}:same", accuracy_weight=2.0)
    with Verifier(config) as verifier:
        assert verifier.parsable(["$\\boxed{key}$ ", " "]) == [True, False]
        rewards = verifier.score([answered(content) for content in contents], ["$\\boxed{key}$ "] * len(contents))
        outside = verifier.score(["no block", answered("4")], ["4"] * 2, None, ["", "number"])
    accuracies = [reward.parts["accuracy"] for reward in rewards]
    assert accuracies == [1.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    faults = [reward.fault for reward in rewards]
    assert faults == [None, "timeout", None, "died", None, "error", "error", "error", "error", None]
    assert [reward.total for reward in rewards] == [2.5, 0, 1.5, 0, 0.5, 0, 0, 0, 0, 2.5]
    assert [reward.parts["accuracy"] for reward in outside] == [0.0, 1.0]
    loads = [path.read_text() for path in Path(file).parent.glob("loaded-*")]
    assert len(loads) >= 2 and set(loads) == {"once\n"}


def test_a_source_may_have_it_and_a_row_may_not(file):
    own = f"{file}:same"
    config = RewardsConfig(verifiers=(f"physics={own}",))
    rows = [Prompt([], "3", str(n), source, "set.jsonl", n, "") for n, source in enumerate(["physics", "else"])]
    assert [prompt.verifier for prompt in choose(rows, config)] == [own, "math"]
    with pytest.raises(UserError, match="set.jsonl: row 7 has 'verifier' .*there is no verifier"):
        choose([Prompt([], "3", "7", "else", "set.jsonl", 7, own)], config)
    # Nor may whoever else hands a name to the workers: they know the config's alone.
    with Verifier(RewardsConfig(workers=1)) as verifier:
        (reward,) = verifier.score([answered("\\boxed{word}")], ["$\\boxed{key}$ "], None, [own])
        assert reward.fault == "error" and reward.total == 0


@pytest.mark.parametrize(
    "name, said",
    [
        ("gone.py:same", "rewards.verifier: gone.py: there is no such file"),
        ("gone.py", "rewards.verifier: 'gone.py' names no function; one's own verifier is FILE.py:FUNCTION"),
    ],
)
def test_a_name_that_names_nothing_is_refused_before_anything_is_loaded(name, said):
    with pytest.raises(UserError, match=f"^{re.escape(said)}"):
        by_source(RewardsConfig(verifier=name))


@pytest.mark.parametrize(
    "text, function, said",
    [
        (OWN, "gone", "own.py: has no function 'gone'"),
        (OWN, "number", "own.py: has no function 'number'"),
        (OWN, "one", "own.py: one must take (answer, gold): too many positional arguments"),
        ("1 / 0", "same", "own.py: cannot be loaded: ZeroDivisionError: division by zero in line 1"),
        ("import nowhere_at_all", "same", "own.py: cannot be loaded: ModuleNotFoundError"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line_when_the_answers_are_read(file, text, function, said):
    Path(file).write_text(text)
    with Verifier(RewardsConfig(workers=1, verifiers=(f"a={file}:{function}",))) as verifier:
        with pytest.raises(UserError) as refused:
            verifier.parsable(["3"])
    assert str(refused.value).startswith(f"rewards.verifier: {file[:-6]}") and said in str(refused.value)
    assert "\n" not in str(refused.value)
