"""A config is a file plus overrides; whatever is wrong in either is one line that names it."""

import contextlib
import dataclasses
import math
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from lmmr1_jax.config import renamed
from lmmr1_jax.config.command_line import parse_train_config
from lmmr1_jax.config.fields import check_ranges, checked, describe_type, field_types
from lmmr1_jax.config.schema import TrainConfig
from lmmr1_jax.runtime.cli import run_cli
from lmmr1_jax.runtime.errors import UserError
from weights_bridge.errors import CheckpointError

HEADER = "import dataclasses\nfrom lmmr1_jax.config.schema import *\n"


def write(folder: Path, body: str) -> str:
    path = folder / "experiment.py"
    path.write_text(HEADER + body)
    return str(path)


def message_of(argv: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        parse_train_config(argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_flags_override_the_file_and_the_file_the_defaults(tmp_path):
    path = write(tmp_path, "config = TrainConfig(run=RunConfig(seed=7, steps=3), learner=LearnerConfig(rows=2))")
    config = parse_train_config(["--run.steps", "5", "--config", path, "--learner.learning-rate", "1e-3"])
    assert (config.run.seed, config.run.steps, config.learner.rows) == (7, 5, 2)
    assert config.learner.learning_rate == 1e-3
    assert config.data == TrainConfig().data


def test_without_a_file_and_flags_every_field_has_its_default():
    assert parse_train_config([]) == TrainConfig()


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--resume"], True),
        (["--run.resume"], True),
        (["--resume", "--run.seed", "1"], True),
        (["--run.resume", "False"], False),
        (["--run.resume=True"], True),
    ],
)
def test_resume_stands_alone_or_takes_a_value(argv, expected):
    assert parse_train_config(argv).run.resume is expected


def test_booleans_take_values_both_ways():
    config = parse_train_config(["--data.shuffle", "False", "--data.allow-http", "--tracking.wandb", "True"])
    assert (config.data.shuffle, config.data.allow_http, config.tracking.wandb) == (False, True, True)


def test_flags_that_others_rely_on_exist():
    config = parse_train_config(
        "--run.dir r --run.seed 1 --run.steps 2 --resume --model.path m --data.path d --data.answer-key gold "
        "--data.min-pixels 10 --data.max-pixels 20 --data.allow-http --eval.path e --eval.size 3 --eval.every 4 "
        "--checkpoint.every 5 --checkpoint.keep 6 --rewards.variant lmm-r1".split()
    )
    assert (config.run.dir, config.model.path, config.data.answer_key) == ("r", "m", "gold")
    assert (config.data.min_pixels, config.data.max_pixels, config.data.allow_http) == (10, 20, True)
    assert dataclasses.astuple(config.eval)[:3] == ("e", 3, 4)
    assert dataclasses.astuple(config.checkpoint) == (5, 6)
    assert config.rewards.variant == "lmm-r1"


def test_every_field_has_a_flag_that_takes_its_own_default():
    argv = []
    for name in field_types(TrainConfig):
        group, field = name.split(".")
        argv += [f"--{name.replace('_', '-')}", str(getattr(getattr(TrainConfig(), group), field))]
    assert parse_train_config(argv) == TrainConfig()


def test_lists_take_several_values_replace_the_files_and_may_be_empty(tmp_path):
    file = tmp_path / "c.py"
    file.write_text("from lmmr1_jax.config import *\nconfig = TrainConfig(rewards=RewardsConfig(functions=('a.py',)))")
    words = ["--config", str(file)]
    assert parse_train_config(words).rewards.functions == ("a.py",)
    argv = [*words, "--rewards.functions", "b.py", "n=c.py:f*0.5", "--run.seed", "1", "--rewards.functions=d.py"]
    assert parse_train_config(argv).rewards.functions == ("b.py", "n=c.py:f*0.5", "d.py")
    assert parse_train_config([*words, "--rewards.functions", ""]).rewards.functions == ()


def test_negative_numbers_empty_strings_and_equals_signs_are_values():
    config = parse_train_config(["--mesh.fsdp", "-1", "--data.path=", "--eval.path", "", "--run.dir=a=b c"])
    assert (config.mesh.fsdp, config.data.path, config.eval.path, config.run.dir) == (-1, "", "", "a=b c")


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--learner.learning-rat", "1"], ["--learner.learning-rat", "--learner.learning-rate"]),
        (["--learning-rate", "1"], ["unknown flag --learning-rate", "--learner.learning-rate"]),
        (["--learner.lr", "1"], ["unknown flag --learner.lr; learner has learning-rate, warmup-ratio"]),
        (["--lerner.learning-rat", "1"], ["did you mean --learner.learning-rate"]),
        (["--zzz"], ["unknown flag --zzz", "--help"]),
        (["--learner.learning-rate", "fast"], ["--learner.learning-rate", "'fast'", "a float"]),
        (["--run.seed", "1", "--run.steps", "1.5"], ["--run.steps", "'1.5'", "an int"]),
        (["--data.shuffle", "maybe"], ["--data.shuffle", "'maybe'", "True or False"]),
        (["--algorithm.loss", "clipp"], ["--algorithm.loss", "clip, gspo"]),
        (["--run.seed"], ["--run.seed needs a value", "an int"]),
        (["--config"], ["--config needs a value"]),
        (["--config", "nowhere.py"], ["nowhere.py", "no such file"]),
        (["run.seed", "1"], ["unexpected argument 'run.seed'"]),
        (["--learner", "1"], ["unknown flag --learner"]),
        (["--rewards:x", "1"], ["unknown flag --rewards:x"]),
    ],
)
def test_wrong_flags_are_one_line_that_names_them(argv, parts):
    message = message_of(argv)
    for part in parts:
        assert part in message


@pytest.mark.parametrize("old", renamed.FIELDS)
def test_a_renamed_field_is_answered_by_its_name_now_as_flag_and_in_a_file(tmp_path, old):
    assert old not in field_types(TrainConfig) and renamed.FIELDS[old] in field_types(TrainConfig)
    flag, now = (f"--{name.replace('_', '-')}" for name in (old, renamed.FIELDS[old]))
    assert message_of([flag, "1"]).startswith(f"{flag} is now {now}")
    assert message_of([f"--{old}=1"]).startswith(f"--{old} is now {now}")
    group, field = old.split(".")
    owner = f"{group.capitalize()}Config"
    path = write(tmp_path, f"config = TrainConfig({group}={owner}({field}=1))")
    told = f"{owner} has no field {field!r}; it is now {renamed.field_now(old)!r}"
    assert told in message_of(["--config", path])


def test_a_renamed_field_whose_values_were_renamed_says_so():
    expected = "--rollout.update is now --rollout.weight-update (between is now drain, within is in-flight)"
    assert message_of(["--rollout.update", "within"]) == expected


def test_a_config_file_that_moved_is_answered_by_where_it_is_now():
    assert message_of(["--config", "configs/grpo.py"]) == "--config configs/grpo.py is now configs/demo/grpo.py"


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        (
            "config = TrainConfig(learner=LearnerConfig(learning_rat=1.0))",
            ["line 3", "learning_rat", "mean learning_rate"],
        ),
        ("config = TrainConfig(learnr=1)", ["TrainConfig has no field 'learnr'", "learner"]),
        ("config = dataclasses.replace(TrainConfig(), zzz=1)", ["TrainConfig has no field 'zzz'", "rollout"]),
        ("config = TrainConfig(run=RunConfig(seed='1'))", ["config.run.seed is '1'", "an int"]),
        ("config = TrainConfig(run=RunConfig(seed=True))", ["config.run.seed is True", "an int"]),
        ("config = TrainConfig(data=DataConfig(shuffle=1))", ["config.data.shuffle is 1", "True or False"]),
        (
            "config = TrainConfig(learner=LearnerConfig(remat='half'))",
            ["config.learner.remat", "none, attention, full"],
        ),
        ("config = TrainConfig(run={'seed': 1})", ["config.run is {'seed': 1}", "a RunConfig"]),
        ("config = RunConfig()", ["`config` of type RunConfig", "TrainConfig"]),
        ("setup = TrainConfig()", ["no `config`"]),
        ("config = TrainConfig(\n", ["line 3", "SyntaxError"]),
        ("\nconfig = undefined_name", ["line 4", "NameError", "undefined_name"]),
        ("import no_such_package", ["line 3", "no_such_package"]),
        ("raise SystemExit('a\\nb')", ["line 3", "SystemExit: a b"]),
    ],
)
def test_wrong_files_are_one_line_that_names_file_and_field(tmp_path, body, parts):
    path = write(tmp_path, body)
    message = message_of(["--config", path])
    for part in [path, *parts]:
        assert part in message


def test_whole_numbers_in_a_file_become_floats_where_floats_stand(tmp_path):
    config = parse_train_config(["--config", write(tmp_path, "config = TrainConfig(rewards=RewardsConfig(timeout=3))")])
    assert isinstance(config.rewards.timeout, float)


def test_optional_fields_and_tuples_are_checked_too():
    @dataclasses.dataclass(frozen=True)
    class Extra:
        limit: int | None = None
        names: tuple[str, ...] = ()

    assert checked(Extra(3, ("a",)), "config") == Extra(3, ("a",))
    with pytest.raises(UserError, match="config.limit is 'x'; it must be an int or None"):
        checked(Extra("x"), "config")
    with pytest.raises(UserError, match="config.names is .*; it must be a tuple of str"):
        checked(Extra(1, (1,)), "config")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--run.seed -1", "run.seed is -1; it must be at least 0"),
        ("--rollout.temperature 0", "rollout.temperature is 0.0; it must be above 0"),
        ("--rollout.temperature nan", "rollout.temperature is nan; it must be above 0"),
        ("--learner.learning-rate inf", "learner.learning_rate is inf; it must be a finite number"),
        ("--algorithm.kl-coefficient nan", "algorithm.kl_coefficient is nan; it must be at least 0"),
        ("--algorithm.clip-high inf", "algorithm.clip_high is inf; it must be a finite number"),
        ("--algorithm.dual-clip 0.5", "algorithm.dual_clip is 0.5; it must be 0 or above 1"),
        ("--rewards.accuracy-weight nan", "rewards.accuracy_weight is nan; it must be a finite number"),
        ("--rollout.prompts 0", "rollout.prompts is 0; it must be at least 1"),
        ("--learner.warmup-ratio 3", "learner.warmup_ratio is 3.0; it must be from 0 to 1"),
        ("--learner.adam-b2 1", "learner.adam_b2 is 1.0; it must be from 0 to below 1"),
        (
            "--rollout.prompts 4 --learner.minibatches 5",
            "learner.minibatches is 5; it must be at most rollout.prompts, 4",
        ),
    ],
)
def test_values_that_no_run_can_use_are_one_line_that_names_the_field(argv, message):
    assert message_of(argv.split()).startswith(message)


def test_a_files_values_have_the_same_ranges(tmp_path):
    path = write(tmp_path, "config = TrainConfig(critic=CriticConfig(value_clip=-1.0))")
    assert message_of(["--config", path]) == "critic.value_clip is -1.0; it must be at least 0"


def test_no_field_takes_nan_and_only_limits_take_infinity():
    floats = {name for name, kind in field_types(TrainConfig).items() if float in (kind, *typing.get_args(kind))}
    taken = set()
    for name in floats:
        group, field = name.split(".")
        for value in (math.nan, math.inf):
            config = TrainConfig(**{group: dataclasses.replace(getattr(TrainConfig(), group), **{field: value})})
            with contextlib.suppress(UserError):
                check_ranges(config)
                taken.add((name, value))
    limits = "rollout.gap_warn rollout.gap_stop learner.max_grad_norm critic.max_grad_norm"
    assert taken == {(name, math.inf) for name in limits.split()} and "algorithm.clip_low" in floats


def test_help_shows_every_field_with_its_line_and_the_files_value(tmp_path, capsys):
    path = write(tmp_path, "config = TrainConfig(run=RunConfig(seed=1234))")
    with pytest.raises(SystemExit) as caught:
        parse_train_config(["--config", path, "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for name in field_types(TrainConfig):
        assert f"--{name.replace('_', '-')}" in shown
    assert "--config FILE" in shown and "1234" in shown and "Peak learning rate." in shown


def test_every_field_of_the_config_can_be_described():
    assert all(describe_type(kind) for kind in field_types(TrainConfig).values())


@pytest.mark.parametrize("error", [UserError("row 3\n  has no answer"), CheckpointError("row 3 has no answer")])
def test_a_users_error_is_one_line_on_stderr_and_status_two(error, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as caught:
        run_cli(main)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: row 3 has no answer\n"


def test_a_config_needs_no_jax():
    code = (
        "import sys, lmmr1_jax.config.command_line as c; c.parse_train_config(['--resume']); "
        "assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
