"""RLOO as published: REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024, arXiv:2402.14740)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lmmr1_jax.algorithms.shaping import Group, Tokens, less_the_mean, shaped_advantages
from lmmr1_jax.config.schema import AlgorithmConfig
from lmmr1_jax.types.records import Rollout


def leave_one_out(rewards: Group) -> Group:
    """A_i = r_i - mean of the others' rewards = (r_i - mean) * n / (n - 1); 0 for a group of one, which has no
    others."""
    rewards = np.asarray(rewards, np.float64)
    return less_the_mean(rewards) * (rewards.size / max(rewards.size - 1, 1))


def advantages(
    rollouts: Sequence[Rollout], config: AlgorithmConfig, log_ratios: Sequence[Tokens] | None = None
) -> list[Rollout]:
    """A_i = r_i - mean of the others' r, the same for every token of a completion.

    With the KL in the reward a completion's reward is r_i - beta * sum_t kl_t, and the baseline is made of these
    whole rewards, as in the paper (its eq. 3 and 8). Arguments as in `shaped_advantages`.
    """
    return shaped_advantages(rollouts, config, log_ratios, leave_one_out, kl_under_baseline=True)
