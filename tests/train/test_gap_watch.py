"""The gap between learner and sampler is warned of, then ends the run; thresholds of 0.02 and 0.2, by hand."""

import math

import pytest

from lmmr1_jax.errors import UserError
from lmmr1_jax.gap_watch import GapWatch


def test_a_small_gap_says_nothing_and_a_larger_one_warns():
    watch = GapWatch(warn=0.02, stop=0.2)
    assert watch.observe(1, 0.02) is None
    assert "0.021" in watch.observe(2, 0.021)


@pytest.mark.parametrize("gap", [0.3, math.nan, math.inf])
def test_the_third_step_in_a_row_above_the_limit_ends_the_run(gap):
    watch = GapWatch(warn=0.02, stop=0.2)
    assert watch.observe(1, gap) and watch.observe(2, gap)
    with pytest.raises(UserError, match="step 3.*rollout.gap_stop"):
        watch.observe(3, gap)


def test_one_good_step_starts_the_count_anew():
    watch = GapWatch(warn=0.02, stop=0.2)
    for step in range(1, 10):
        watch.observe(step, 0.0 if step % 3 == 0 else 0.3)


def test_the_count_survives_a_resume():
    watch, resumed = GapWatch(0.02, 0.2), GapWatch(0.02, 0.2)
    watch.observe(1, 0.3), watch.observe(2, 0.3)
    resumed.restore(watch.state())
    with pytest.raises(UserError):
        resumed.observe(3, 0.3)
