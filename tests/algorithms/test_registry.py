"""What a run may ask of an algorithm, and what it has to compute for it."""

import dataclasses

import pytest

from lmmr1_jax.algorithms import registry
from lmmr1_jax.config import AlgorithmConfig, LearnerConfig, RolloutConfig, TrainConfig
from lmmr1_jax.errors import UserError


def config(learner=None, rollout=None, **algorithm):
    return TrainConfig(
        algorithm=AlgorithmConfig(**algorithm),
        learner=LearnerConfig(**(learner or {})),
        rollout=RolloutConfig(**(rollout or {})),
    )


def test_defaults_pass_for_every_algorithm():
    for name in registry.ALGORITHMS:
        registry.check(config(name=name))


def test_a_field_that_the_algorithm_does_not_read_is_refused_by_name():
    with pytest.raises(UserError, match="algorithm.reward_clip.*rloo_lmm_r1"):
        registry.check(config(reward_clip=5.0))
    registry.check(config(name="rloo_lmm_r1", reward_clip=5.0))


def test_every_field_is_read_by_some_algorithm():
    read = set().union(*(a.reads for a in registry.ALGORITHMS.values()))
    assert read == {f.name for f in dataclasses.fields(AlgorithmConfig)} - {"name"}


def test_a_group_of_one_is_refused():
    with pytest.raises(UserError, match="rollout.completions is 1"):
        registry.check(config(rollout={"completions": 1}))


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match="rloo, rloo_lmm_r1"):
        registry.check(config(name="grpo2"))


def test_no_pass_is_made_that_nothing_needs():
    assert not registry.needs_reference(config()) and not registry.needs_old(config())
    assert registry.needs_old(config(learner={"minibatches": 2}))
    assert registry.needs_old(config(learner={"epochs": 2}))
    assert registry.needs_reference(config(kl_coefficient=0.1)) and registry.needs_old(config(kl_coefficient=0.1))
    in_loss = config(kl_coefficient=0.1, kl_placement="loss")
    assert registry.needs_reference(in_loss) and not registry.needs_old(in_loss)
