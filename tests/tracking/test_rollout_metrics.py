"""The figures of a step, worked out by hand for groups with known rewards."""

import math

import pytest
from tracking.rollout_samples import group

from lmmr1_jax.tracking.rollout_metrics import rollout_metrics
from lmmr1_jax.types.records import Reward, Rollout


def test_every_completion_counts_once():
    # Rewards 1.5, 0.5, 0 and lengths 4, 8, 3; one is right, two are in form, one is cut, one faulted.
    metrics = rollout_metrics([group()])
    assert metrics["reward/mean"] == pytest.approx(2 / 3)
    assert metrics["reward/std"] == pytest.approx(math.sqrt((1.5**2 + 0.5**2) / 3 - (2 / 3) ** 2))
    assert metrics["reward/accuracy"] == pytest.approx(1 / 3)
    assert metrics["reward/format"] == pytest.approx(2 / 3)
    assert metrics["completion/length"] == 5
    assert metrics["completion/longest"] == 8
    assert metrics["completion/truncated"] == pytest.approx(1 / 3)
    assert (metrics["reward/faults"], metrics["reward/timeouts"]) == (1, 1)


def test_a_group_with_equal_rewards_is_counted_as_teaching_nothing():
    equal = group("b", (Reward(0.5, {"accuracy": 0.0, "format": 1.0}),) * 3)
    assert rollout_metrics([group("a"), equal])["reward/equal_groups"] == 0.5


def test_completions_without_rewards_are_refused():
    with pytest.raises(ValueError, match="reward"):
        rollout_metrics([Rollout(group().encoded, group().completions)])


def test_no_rollouts_give_no_figures():
    assert rollout_metrics([]) == {}
