"""What a run may ask of an algorithm, and what it has to compute for it."""

import dataclasses
import re
import typing
from pathlib import Path

import pytest

from lmmr1_jax.algorithms import registry
from lmmr1_jax.config.command_line import load_config_file
from lmmr1_jax.config.fields import field_types
from lmmr1_jax.config.schema import AlgorithmConfig, CriticConfig, LearnerConfig, RolloutConfig, TrainConfig
from lmmr1_jax.runtime.errors import UserError

ROOT = Path(__file__).parents[2]


def config(learner=None, rollout=None, **algorithm):
    return TrainConfig(
        algorithm=AlgorithmConfig(**algorithm),
        learner=LearnerConfig(**(learner or {})),
        rollout=RolloutConfig(**(rollout or {})),
    )


@pytest.mark.parametrize("name", registry.ALGORITHMS)
def test_defaults_pass_and_what_they_stand_for_can_be_written_out(name):
    filled = registry.checked(config(name=name))
    assert registry.checked(filled) == filled == registry.resolved(config(name=name))
    for field, value in registry.ALGORITHMS[name].filled_in.items():
        assert getattr(filled.algorithm, field) == value
    assert registry.policy_loss(filled.algorithm) is registry.ALGORITHMS[name].loss


def test_the_config_names_exactly_the_losses_that_there_are():
    names = typing.get_args(typing.get_args(field_types(AlgorithmConfig)["loss"])[0])
    assert names == tuple(registry.POLICY_LOSSES)


@pytest.mark.parametrize("name", registry.ALGORITHMS)
def test_the_algorithms_own_values_yield_to_the_configs(name):
    given = dict(loss="cispo", clip_low=0.1, clip_high=0.7, aggregation="constant", normalize_advantages="batch",
                 kl_coefficient=0.1, kl_estimator="k2", kl_placement="reward", overlong_share=0.5)  # fmt: skip
    filled = registry.checked(config(name=name, **given, rollout={"max_new_tokens": 33})).algorithm
    assert {field: getattr(filled, field) for field in given} == given
    assert filled.aggregation_length == 33


@pytest.mark.parametrize(
    "fields, readers",
    [
        (dict(gae_lambda=0.9), "only ppo does"),
        (dict(reward_clip=5.0), "ppo, rloo_lmm_r1, reinforce_pp, reinforce_pp_baseline"),
        (dict(discount=0.9), "only ppo, rloo_lmm_r1, reinforce_pp do"),
        (dict(name="grpo", discount=0.9), "grpo does not read it"),
        (dict(loss="policy_gradient", clip_low=0.1), "algorithm.loss is 'policy_gradient'"),
        (dict(loss="policy_gradient", clip_high=0.1), "algorithm.loss is 'policy_gradient'"),
        (dict(name="cispo", dual_clip=3.0), "algorithm.loss is 'cispo': it needs loss clip or gspo"),
        (dict(aggregation_length=9), "algorithm.aggregation is 'token': it needs aggregation constant"),
        (dict(normalize_std=False), "algorithm.normalize_advantages is 'none'"),
        (dict(overlong_penalty=0.5), "it needs an overlong_share above 0"),
        (dict(kl_estimator="k3"), "it needs a kl_coefficient above 0"),
        (dict(name="grpo", kl_placement="reward"), "it needs a kl_coefficient above 0"),
        (dict(kl_target=0.1), "it needs a kl_coefficient above 0"),
        (dict(kl_coefficient=0.1, kl_horizon=5.0), "it needs a kl_target above 0"),
        (dict(importance="none", importance_cap=3.0), "algorithm.importance is 'none'"),
    ],
)
def test_a_field_that_nothing_reads_is_refused_in_one_line_that_names_it(fields, readers):
    with pytest.raises(UserError) as refused:
        registry.checked(config(**fields))
    message, last = str(refused.value), list(fields)[-1]
    assert message.startswith(f"algorithm.{last} is set") and readers in message and "\n" not in message


@pytest.mark.parametrize(
    "name, critic, said",
    [
        ("rloo", dict(learning_rate=1e-3), "critic.learning_rate is set, but rloo has no critic (only ppo has one)"),
        ("grpo", dict(backbone="shared"), "critic.backbone is set, but grpo has no critic"),
        ("ppo", dict(loss_weight=0.5), "critic.loss_weight is set, but nothing reads it while critic.backbone"),
        ("ppo", dict(backbone="shared", freeze_vision=True), "critic.freeze_vision is set, but nothing reads it"),
        ("ppo", dict(backbone="shared", path="x"), "critic.path is set, but nothing reads it while critic.backbone is"),
    ],
)
def test_a_field_of_the_critic_that_nothing_reads_is_refused(name, critic, said):
    given = dataclasses.replace(config(name=name), critic=CriticConfig(**critic))
    with pytest.raises(UserError) as refused:
        registry.checked(given)
    assert str(refused.value).startswith(said) and "\n" not in str(refused.value)


def test_a_critic_is_the_baseline_and_leaves_no_group_to_normalise_over():
    registry.checked(config(name="ppo", rollout={"completions": 1}))
    with pytest.raises(UserError, match="normalize_advantages is 'group', but ppo has a critic"):
        registry.checked(config(name="ppo", normalize_advantages="group"))


def test_the_same_fields_pass_where_something_reads_them():
    registry.checked(config(name="rloo_lmm_r1", reward_clip=5.0, discount=0.9, normalize_std=False))
    registry.checked(config(name="gspo", dual_clip=3.0, kl_coefficient=0.1, kl_target=0.1, kl_horizon=5.0))
    registry.checked(config(name="dr_grpo", aggregation_length=9, overlong_share=0.1, overlong_penalty=0.5))


@pytest.mark.parametrize("name", sorted(set(registry.ALGORITHMS) - {"reinforce_pp", "ppo"}))
def test_a_group_of_one_is_refused_where_groups_are_compared(name):
    with pytest.raises(UserError, match=f"rollout.completions is 1; {name}"):
        registry.checked(config(name=name, rollout={"completions": 1}))


def test_without_a_group_there_is_nothing_to_normalise_over():
    registry.checked(config(name="reinforce_pp", rollout={"completions": 1}))
    for field in ("normalize_rewards", "normalize_advantages"):
        with pytest.raises(UserError, match="rollout.completions is 1"):
            registry.checked(config(name="reinforce_pp", rollout={"completions": 1}, **{field: "group"}))


def test_dynamic_sampling_needs_groups_that_are_not_sampled_ahead():
    registry.checked(config(name="reinforce_pp", dynamic_sampling_rounds=2))
    for name, fields in (("completions", {"completions": 1}), ("staleness", {"staleness": 1})):
        with pytest.raises(UserError, match=f"rollout.{name}"):
            registry.checked(config(name="reinforce_pp", dynamic_sampling_rounds=2, rollout=fields))


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match="cispo, dapo, dr_grpo, grpo, gspo, ppo, reinforce_pp, .*rloo, rloo_lmm_r1"):
        registry.checked(config(name="grpo2"))


def test_no_pass_is_made_that_nothing_needs():
    assert not registry.needs_reference(config()) and not registry.needs_old(config())
    assert registry.needs_old(config(learner={"minibatches": 2}))
    assert registry.needs_old(config(learner={"epochs": 2}))
    assert registry.needs_reference(config(kl_coefficient=0.1)) and registry.needs_old(config(kl_coefficient=0.1))
    in_loss = config(kl_coefficient=0.1, kl_placement="loss")
    assert registry.needs_reference(in_loss) and not registry.needs_old(in_loss)
    assert not registry.needs_old(config(name="grpo", kl_coefficient=0.1))


OWN = """
from lmmr1_jax.algorithms.algorithm import Algorithm

def advantages(rollouts, config, log_ratios):
    return rollouts

def loss(inputs, config):
    return inputs.log_probs, inputs.mask

ALGORITHM = Algorithm("mine", advantages=advantages, loss=loss{})
"""


def own_file(folder, extra="", text=OWN):
    (folder / "mine.py").write_text(text.replace("{}", extra))
    return str(folder / "mine.py")


def test_an_algorithm_of_a_file_needs_no_name_and_is_written_out_so_that_it_is_found_again(tmp_path, monkeypatch):
    file = own_file(tmp_path, ", defaults={'clip_low': 0.3}, reads=['clip_low'], smallest_group=1")
    monkeypatch.chdir(tmp_path)
    filled = registry.checked(config(file="mine.py", rollout={"completions": 1}))
    monkeypatch.chdir("/")
    assert registry.checked(filled) == filled
    own = filled.algorithm
    assert (own.name, own.file, own.loss, own.clip_low, own.aggregation) == ("mine", file, None, 0.3, "token")
    assert registry.policy_loss(own).__name__ == "loss" and registry.algorithm(own).advantages([1], own, None) == [1]
    assert registry.policy_loss(registry.checked(config(file=file, loss="cispo")).algorithm).__name__ == "cispo"


def test_an_algorithm_of_a_file_refuses_what_it_does_not_say_that_it_reads(tmp_path):
    file = own_file(tmp_path, ", reads=['clip_low', 'normalize_rewards']")
    registry.checked(config(file=file, clip_low=0.1, normalize_rewards="group"))
    for fields, said in (
        (dict(clip_high=0.1), "algorithm.clip_high is set, but nothing reads it while algorithm.loss is None"),
        (dict(kl_coefficient=0.1, kl_placement="reward"), "algorithm.kl_placement is set, but mine does not read it"),
        (dict(normalize_std=False), "algorithm.normalize_std is set, but mine does not read it"),
    ):
        with pytest.raises(UserError, match=said):
            registry.checked(config(file=file, **fields))
    with pytest.raises(UserError, match="rollout.completions is 1; mine"):
        registry.checked(config(file=file, rollout={"completions": 1}))


@pytest.mark.parametrize(
    "text, name, said",
    [
        (None, "rloo", "mine.py: there is no such file"),
        ("x = 1", "rloo", "mine.py exports no ALGORITHM; it must export `ALGORITHM = Algorithm"),
        ("ALGORITHM = 3", "rloo", "mine.py exports an ALGORITHM of type int"),
        ("x = 1\n1 / 0", "rloo", "mine.py: cannot be loaded: ZeroDivisionError: division by zero in line 2"),
        ("def f(:", "rloo", "mine.py: cannot be loaded: SyntaxError"),
        (OWN.replace('"mine"', '"grpo"'), "rloo", "mine.py: 'grpo' is the name of an algorithm that ships"),
        (OWN.replace("loss=loss", "loss='clipp'"), "rloo", "loss is 'clipp'; it must be one of clip, gspo"),
        (OWN.replace("loss=loss", "loss=3"), "rloo", "ValueError: loss is 3; it must be a function in line 10"),
        (OWN.replace("{}", ", reads=['seed']"), "rloo", "reads has 'seed'; it may have discount"),
        (OWN.replace("{}", ", defaults={'name': 1}"), "rloo", "defaults has 'name'; it may have clip_low"),
        (OWN.replace("{}", ", defaults={'clip_low': '1'}"), "rloo", "clip_low is '1'; it must be a float"),
        (OWN.replace("{}", ", defaults={'clip_low': -1.0}"), "rloo", "clip_low is -1.0; it must be at least 0"),
        (OWN.replace("{}", ", defaults={'reward_clip': 1.0}"), "rloo", "'reward_clip', which its reads have not"),
        (OWN, "ppo", "algorithm.name is 'ppo', but algorithm.file .*mine.py has 'mine'"),
    ],
)
def test_a_faulty_file_of_an_algorithm_is_one_line_that_names_it(tmp_path, text, name, said):
    file = str(tmp_path / "mine.py") if text is None else own_file(tmp_path, text=text)
    with pytest.raises(UserError, match=said) as refused:
        registry.checked(config(name=name, file=file))
    assert "algorithm.file" in str(refused.value) and file in str(refused.value)


def test_resolving_touches_nothing_but_the_algorithm():
    given = config(name="dapo", rollout={"prompts": 3})
    assert dataclasses.replace(registry.resolved(given), algorithm=given.algorithm) == given


def test_the_table_of_the_docs_says_what_the_registry_has():
    rows = re.findall(
        r"^\| `(\w+)` \| `(configs/[\w/]+\.py)` \|(.*)\|$", (ROOT / "docs" / "algorithms.md").read_text(), re.M
    )
    assert [name for name, *_ in rows] == list(registry.ALGORITHMS)
    for name, preset, rest in rows:
        _, loss, bounds, average, kl = (cell.strip() for cell in rest.split("|"))
        own = registry.resolved(config(name=name)).algorithm
        assert (loss, average) == (f"`{own.loss}`", f"`{own.aggregation}`")
        assert tuple(float(bound) for bound in bounds.split(",")) == (own.clip_low, own.clip_high)
        assert kl.startswith(f"{own.kl_estimator}, in the {own.kl_placement}")
        assert load_config_file(ROOT / preset).algorithm.name == name
