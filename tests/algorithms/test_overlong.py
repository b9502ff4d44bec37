"""DAPO's soft penalty for length, against numbers worked out by hand."""

import dataclasses

import pytest
from algorithms.rewarded import group, settings

from lmmr1_jax.algorithms.overlong import overlong, with_overlong_penalty


@pytest.mark.parametrize("length, expected", [(1, 0), (16, 0), (17, -0.25), (18, -0.5), (20, -1), (25, -1)])
def test_the_penalty_falls_in_a_straight_line_to_the_limit(length, expected):
    assert overlong(length, limit=20, share=0.2) == pytest.approx(expected)


def test_the_penalty_is_a_part_of_the_reward_and_counts_by_its_weight():
    rollouts = [group([1.0, 0.5], [8, 2]), group([0.0], [7])]
    made = with_overlong_penalty(rollouts, settings("dapo", overlong_share=0.5, overlong_penalty=0.4), 8)
    assert [[w.total for w in r.rewards] for r in made] == [pytest.approx([0.6, 0.5]), [pytest.approx(-0.3)]]
    assert [w.parts["overlong"] for r in made for w in r.rewards] == [-1, 0, -0.75]


def test_a_completion_that_could_not_be_judged_earns_0_however_long_it_is():
    rollout = group([0.0, 0.5], [8, 8])
    faulty = dataclasses.replace(rollout.rewards[0], fault="timeout")
    rollout = dataclasses.replace(rollout, rewards=(faulty, rollout.rewards[1]))
    (made,) = with_overlong_penalty([rollout], settings("dapo", overlong_share=0.5), 8)
    assert [w.total for w in made.rewards] == [0.0, -0.5] and made.rewards[0].parts == {"overlong": -1}


def test_a_share_of_nothing_leaves_rewards_as_they_are():
    rollouts = [group([1.0], [8])]
    assert with_overlong_penalty(rollouts, settings(), 8) == rollouts
