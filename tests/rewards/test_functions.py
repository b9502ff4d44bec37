"""Your own reward function: what it is given, what it may return, and what its faults cost."""

import dataclasses
import os
import re
import signal
import sys
import textwrap
from pathlib import Path

import pytest
from judged_groups import decode, rollout
from waiting import alive, wait_until

from lmmr1_jax.config.schema import RewardsConfig
from lmmr1_jax.rewards.rules.service import Verifier
from lmmr1_jax.rewards.sources.base import Group, RewardFailed, Rewards, RuleSource
from lmmr1_jax.rewards.sources.function import FunctionSource
from lmmr1_jax.rewards.sources.specs import check_rewards, read_functions, read_servers
from lmmr1_jax.runtime.errors import UserError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes through /proc")


@pytest.fixture
def source(tmp_path):
    """Makes a source of a function's text."""
    made = []

    def make(text, entry="{file}", **changes):
        file = tmp_path / f"mine{len(made)}.py"
        file.write_text(textwrap.dedent(text))
        config = RewardsConfig(functions=(entry.format(file=file),), **{"function_timeout": 20.0, **changes})
        (spec,) = read_functions(config)
        made.append(FunctionSource(spec, config))
        return made[-1]

    yield make
    for one in made:
        one.close()


def judge(source, *rollouts):
    return source.score([Group(r, decode) for r in rollouts])


def test_openrlhfs_form_gets_queries_prompts_and_labels(source):
    function = source(
        """
        def reward_func(queries, prompts, labels):
            assert all(q.startswith(p) and p.endswith("assistant\\n") for q, p in zip(queries, prompts))
            return [len(q) - len(p) + 100 * int(label) for q, p, label in zip(queries, prompts, labels)]
        """,
        entry="length={file}*0.5",
    )
    ((one, two), (three,)) = judge(function, rollout(["ab", "abcd<|im_end|>"]), rollout([""], label="4"))
    assert [one.parts, two.parts, three.parts] == [{"length": 302.0}, {"length": 314.0}, {"length": 400.0}]
    assert [one.total, two.total, three.total] == [151.0, 157.0, 200.0]


def test_the_richer_form_gets_whole_rollouts_and_names_its_parts(source):
    function = source(
        """
        def judge(rollout):
            assert rollout["prompt_id"] == "7" and rollout["data_source"] == "counting" and rollout["label"] == "3"
            assert rollout["images"] == [{"height": 28, "width": 56}]
            assert len(str(rollout["messages"])) < 500 and rollout["messages"][0]["role"] == "user"
            assert rollout["prompt"].count("<|image_pad|>") == 1
            texts = [c["text"] for c in rollout["completions"]]
            assert [c["raw_text"] for c in rollout["completions"]] == [text + "<|im_end|>" for text in texts]
            tokens = [float(len(c["token_ids"])) for c in rollout["completions"]]
            stopped = [c["finish_reason"] == "stop" for c in rollout["completions"]]
            return [{"tokens": t, "stopped": s} for t, s in zip(tokens, stopped)]
        """,
        entry="{file}:judge*2",
    )
    ((one, two),) = judge(function, rollout(["a<|im_end|>", "bcd<|im_end|>"], prompt="<|image_pad|>" * 30 + "How?"))
    assert one.parts == {"mine0/tokens": 11.0, "mine0/stopped": 1.0} and one.total == 24.0
    assert two.parts["mine0/tokens"] == 13.0


@pytest.mark.parametrize(
    "arguments, first",
    [
        ("rollout, strict=True", "dict"),
        ("group, low=0.1, high=2.0", "dict"),
        ("rollout", "dict"),
        ("queries, prompts=None, labels=None", "list"),
        ("queries, prompts", "list"),
        ("*columns", "list"),
        ("queries, prompts, labels, verbose=False", "list"),
    ],
)
def test_the_form_follows_from_the_arguments_that_a_function_needs(source, arguments, first):
    name = arguments.split(",")[0].strip("*")
    given = f"{name}[0]" if arguments[0] == "*" else name
    function = source(f"def reward_func({arguments}): return [float(type({given}).__name__ == {first!r})]")
    assert judge(function, rollout(["a"]))[0][0].total == 1.0


@pytest.mark.parametrize(
    "returned, total, parts",
    [
        ("[{'reward': 0.25, 'seen': 9}] * 2", 0.25, {"mine0": 0.25, "mine0/seen": 9.0}),
        ("{'rewards': [1, 1], 'extra_logs': {'seen': [2, 2]}}", 1.0, {"mine0": 1.0, "mine0/seen": 2.0}),
        ("(True, True)", 1.0, {"mine0": 1.0}),
        ("__import__('numpy').full(2, 0.5)", 0.5, {"mine0": 0.5}),
    ],
)
def test_numbers_come_in_several_forms(source, returned, total, parts):
    ((one, _),) = judge(source(f"def reward_func(queries, prompts, labels): return {returned}"), rollout(["a", "b"]))
    assert one.total == total and one.parts == parts


def test_the_examples_in_the_docs_run(source):
    page = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
    blocks = [block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "def same_unit" not in block]
    for block, name, part in zip(blocks, ("reward_func", "judge"), ("mine0", "mine1/brief"), strict=True):
        ((one, _),) = judge(source(block, entry="{file}:" + name), rollout(["a", "b"]))
        assert part in one.parts


FAULTY = {
    "raise ValueError('broken')": "raised ValueError: broken in line 2",
    "raise SystemExit(3)": "raised SystemExit: 3",
    "return [1.0, float('nan')]": "returned nan for completion 1",
    "return [float('inf'), 1.0]": "returned inf for completion 0",
    "return [1.0]": "returned 1 values for 2 completions",
    "return None": "returned NoneType, not a list",
    "return ['1', '2']": "returned str for completion 0, not a number",
    "return {'scores': [1, 2]}": "returned a dict without 'rewards'",
    "return [{'a': None}, {}]": "returned NoneType for 'a' of completion 0",
    "import os; os._exit(1)": "died",
    "import os; os.kill(os.getpid(), 9)": "died",
    "exec('while True: pass')": "took longer than rewards.function_timeout, 1 s",
    "import signal, time; signal.pthread_sigmask(0, range(1, 32)); time.sleep(60)": "took longer than",
}


@pytest.mark.parametrize("body", FAULTY)
def test_a_fault_names_file_function_and_cause_and_concerns_its_own_prompt(source, body):
    function = source(
        f"""def reward_func(queries, prompts, labels):
            if labels[0] == "3": {body}
            return [1.0] * len(queries)""",
        function_timeout=1.0,
    )
    before, bad, after = judge(function, rollout(["a"], "4"), rollout(["a", "b"], "3"), rollout(["a"], "5"))
    assert [before[0].total, after[0].total] == [1.0, 1.0]
    assert len(bad) == 2 and FAULTY[body] in bad[0].detail
    assert "mine0.py" in bad[0].detail and "'7'" in bad[0].detail


UNUSABLE = {
    "x = 1": "no function 'reward_func' (it defines none)",
    "def other(a): pass": "it defines other",
    "def reward_func(): pass": "must take (queries, prompts, labels), or (rollout)",
    "def reward_func(a, b, c, d): pass": "must take (queries, prompts, labels), or (rollout)",
    "reward_func = 3": "no function 'reward_func'",
    "import nothing_of_this_name": "ModuleNotFoundError: No module named 'nothing_of_this_name' in line 1",
    "def reward_func(:": "SyntaxError",
    "import time; time.sleep(60)": "not ready within 2 s",
    "import sys; sys.exit(0)": "SystemExit",
}


@pytest.mark.parametrize("text", UNUSABLE)
def test_a_file_that_cannot_be_used_is_one_clear_line_before_the_first_step(source, text):
    with pytest.raises(UserError) as error:
        source(text, function_timeout=2.0).check(Group(rollout(["a"]), decode))
    assert UNUSABLE[text] in str(error.value) and "mine0.py" in str(error.value)
    assert not isinstance(error.value, RewardFailed)  # whatever `on_error` says


def test_a_function_is_tried_before_the_first_step(source):
    function = source("def reward_func(queries, prompts, labels): return [float('nan')] * len(queries)")
    rewards = Rewards([function], decode, on_error="stop")
    with pytest.raises(RewardFailed, match="returned nan for completion 0"):
        rewards.check(rollout(["a"]))
    rewards = Rewards([function], decode, on_error="zero")
    rewards.check(rollout(["a"]))
    assert "returned nan" in rewards.warnings()[0] and rewards.warnings() == []


def test_the_config_says_whether_a_fault_ends_the_run_or_costs_its_completions(source):
    function = source(
        """
        def reward_func(queries, prompts, labels):
            return [1 / (int(label) - 3) for label in labels]
        """
    )
    groups = [rollout(["<answer>4</answer>"] * 2, "4"), rollout(["<answer>3</answer>"] * 2, "3")]
    with Verifier(RewardsConfig()) as verifier:
        with pytest.raises(RewardFailed, match="ZeroDivisionError"):
            Rewards([RuleSource(verifier), function], decode, on_error="stop").score(groups)
        rewards = Rewards([RuleSource(verifier), function], decode, on_error="zero")
        good, bad = rewards.score(groups)
        rewards.score(groups)
    assert [r.total for r in good.rewards] == [2.0, 2.0] and good.rewards[0].fault is None
    assert good.rewards[0].parts == {"accuracy": 1.0, "format": 0.0, "mine0": 1.0}
    assert [(r.total, r.fault) for r in bad.rewards] == [(0.0, "error")] * 2
    assert bad.rewards[0].parts == {"accuracy": 1.0, "format": 0.0}
    assert len(rewards.warnings()) == 1


def test_the_function_runs_in_another_process_that_ends_with_all_it_started(source):
    function = source(
        """
        import os, subprocess
        def reward_func(queries, prompts, labels):
            child = subprocess.Popen(["sleep", "1000"])
            return [os.getpid(), child.pid]
        """
    )
    ((own, child),) = judge(function, rollout(["a", "b"]))
    pids = [int(own.total), int(child.total)]
    assert os.getpid() not in pids and all(Path(f"/proc/{pid}").exists() for pid in pids)
    function.close()
    assert wait_until(lambda: not any(map(alive, pids)))


def test_as_many_prompts_are_judged_at_a_time_as_there_are_workers(source, tmp_path):
    function = source(
        f"""
        import os, pathlib, time
        def reward_func(queries, prompts, labels):
            here = pathlib.Path({str(tmp_path)!r})
            (here / f"began-{{labels[0]}}").touch()
            while len(list(here.glob("began-*"))) < 2:  # until the other prompt is being judged too
                time.sleep(0.01)
            return [os.getpid()]
        """,
        function_workers=2,
    )
    ((one,), (other,)) = judge(function, rollout(["a"], "1"), rollout(["b"], "2"))
    assert one.total != other.total


def test_a_process_that_is_killed_is_replaced(source):
    function = source("import os\ndef reward_func(queries, prompts, labels): return [os.getpid()]")
    first = int(judge(function, rollout(["a"]))[0][0].total)
    os.kill(first, signal.SIGKILL)
    assert wait_until(lambda: not alive(first))
    assert int(judge(function, rollout(["a"]))[0][0].total) != first


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"functions": ("none.py",)}, "none.py: there is no such file"),
        ({"functions": (f"{__file__}:no-name",)}, "no name of a function"),
        ({"functions": (f"{__file__}*x",)}, "is not .*WEIGHT"),
        ({"functions": (f"{__file__}*nan",)}, "is not .*WEIGHT"),
        ({"functions": (__file__, __file__)}, "two rewards are called 'test_functions'"),
        ({"functions": (f"accuracy={__file__}",)}, "a reward is called 'accuracy', which is a metric of the run"),
        ({"urls": ("localhost:5000",)}, "is no address"),
        ({"urls": ("file:///etc/passwd",)}, "is no address"),
        ({"urls": ("http://a:99999/x",)}, "is no address"),
        ({"urls": ("http://a/x", "server=http://b/x")}, "two rewards are called 'server'"),
    ],
)
def test_sources_that_cannot_be_meant_are_refused_before_anything_is_loaded(changes, words):
    with pytest.raises(UserError, match=words):
        check_rewards(dataclasses.replace(RewardsConfig(), **changes))


def test_entries_are_read_with_name_and_weight():
    config = RewardsConfig(functions=(f"a={__file__}:f*-0.5", __file__), urls=("http://x/y?a=b*2", "z=http://p,http://q"))
    first, second = read_functions(config)
    assert (first.name, first.function, first.weight, second.name) == ("a", "f", -0.5, "test_functions")
    assert [(s.name, s.urls, s.weight) for s in read_servers(config)] == [
        ("server", ("http://x/y?a=b",), 2.0),
        ("z", ("http://p", "http://q"), 1.0),
    ]
