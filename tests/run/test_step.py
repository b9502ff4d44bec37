"""What a step tells of its updates, and what steers the next one."""

import types

import numpy as np
import pytest

from lmmr1_jax.config.schema import AlgorithmConfig, TrainConfig
from lmmr1_jax.run.step import Step


class Learner:
    """Tells what it is given."""

    def update(self, state, batch):
        return state + 1, dict(batch.told)


def updated(*batches, completions=10, **algorithm):
    """The step, and what it tells after updates with minibatches of so many tokens, whose learner tells so much."""
    network = types.SimpleNamespace(compute_dtype=np.float32)
    sampler = types.SimpleNamespace(release_params=lambda: None)
    policy = types.SimpleNamespace(sampler=sampler, network=network, load=dict)
    step = Step(TrainConfig(algorithm=AlgorithmConfig(**algorithm)), policy, Learner(), judge=None)
    given = [
        types.SimpleNamespace(tokens_total=np.float32(tokens), completions_total=np.float32(completions), told=told)
        for tokens, told in batches
    ]
    state, metrics = step.update(0, given)
    assert state == len(batches)
    return step, metrics


def told(number):
    names = "kl entropy clip_fraction importance/mean loss/policy grad_norm gap/mean gap/max learning_rate "
    return dict.fromkeys((names + "skipped_updates loss/value value/clip_fraction").split(), number)


def test_a_steps_means_are_over_its_tokens_whatever_the_minibatches():
    _, metrics = updated((30, told(1.0)), (10, told(3.0)))
    # 30 tokens of 1 and 10 of 3
    for name in ("kl", "entropy", "clip_fraction", "importance/mean", "loss/value", "value/clip_fraction"):
        assert metrics[name] == pytest.approx(1.5), name
    # one number for each update
    assert metrics["grad_norm"] == metrics["loss/policy"] == 2.0
    # of the weights that sampled, and of the last update
    assert metrics["gap/mean"] == metrics["gap/max"] == 1.0
    assert metrics["learning_rate"] == metrics["skipped_updates"] == 3.0


def test_the_kls_coefficient_is_steered_by_the_whole_step_and_moves_after_it():
    # a KL of 0.3 in a quarter of the tokens and of 0.01 in the others is below the target of 0.1, though their mean is
    # above it; beta (1 - 0.175 * 1024 / 10,000)
    batches = (30, told(0.01)), (10, told(0.3))
    step, metrics = updated(*batches, completions=512, kl_coefficient=0.01, kl_target=0.1)
    assert metrics["kl"] == pytest.approx(0.0825) and metrics["kl_coefficient"] == 0.01
    assert step.kl_coefficient == pytest.approx(0.01 * (1 - 0.175 * 0.1024))
    assert updated(*batches, kl_coefficient=0.01)[0].kl_coefficient == 0.01
