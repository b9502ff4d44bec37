"""RLOO as published: REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024, arXiv:2402.14740).

    A_i = r_i - mean of the others' rewards, the same for every token of a completion

With the KL in the reward a completion's reward is r_i - beta * sum_t kl_t, and the baseline is made of these whole
rewards, as in the paper (its eq. 3 and 8).
"""

from __future__ import annotations

import functools

import numpy as np

from lmmr1_jax.algorithms import shaping
from lmmr1_jax.algorithms.algorithm import Algorithm
from lmmr1_jax.algorithms.policy_losses import clip
from lmmr1_jax.algorithms.shaping import Group, less_the_mean, shaped_advantages


def leave_one_out(rewards: Group) -> Group:
    """A_i = r_i - mean of the others' rewards = (r_i - mean) * n / (n - 1); 0 for a group of one, which has no
    others."""
    rewards = np.asarray(rewards, np.float64)
    return less_the_mean(rewards) * (rewards.size / max(rewards.size - 1, 1))


ALGORITHM = Algorithm(
    "rloo",
    advantages=functools.partial(shaped_advantages, baseline=leave_one_out, kl_under_baseline=True),
    loss=clip,
    defaults={"kl_estimator": "k1", "kl_placement": "reward"},
    reads=set(shaping.READS) - {"reward_clip"},
)
