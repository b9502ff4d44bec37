"""RLOO as published: REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024, arXiv:2402.14740)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from lmmr1_jax.algorithms.kl import kl_per_token
from lmmr1_jax.config import AlgorithmConfig
from lmmr1_jax.types import Rollout


def leave_one_out(rewards: Float[np.ndarray, "group"]) -> Float[np.ndarray, "group"]:
    """A_i = r_i - mean of the others' rewards = (r_i - mean) * n / (n - 1), in float64.

    Raises ValueError for a group of one, which has no others.
    """
    rewards = np.asarray(rewards, np.float64)
    count = rewards.size
    if count < 2:
        raise ValueError("a leave-one-out baseline needs at least 2 completions in a group")
    return rewards - (rewards.sum() - rewards) / (count - 1)


def advantages(
    rollouts: Sequence[Rollout],
    config: AlgorithmConfig,
    log_ratios: Sequence[Float[np.ndarray, "completion"]] | None = None,
) -> list[Rollout]:
    """The same rollouts with their advantages.

    With the KL in the reward the completion's reward is r_i - beta * sum_t kl_t, and the baseline is made of these
    whole rewards, as in the paper (its eq. 3 and 8): every token of a completion has the same advantage.

    Args:
      rollouts: groups with their rewards.
      config: reads `kl_coefficient`, `kl_estimator` and `kl_placement`.
      log_ratios: policy minus reference log-probs per completion, groups one after the other; needed when the KL is
        in the reward.
    """
    kls = iter(token_kls(rollouts, config, log_ratios))
    result = []
    for rollout in rollouts:
        rewards = np.asarray([r.total for r in rollout.rewards], np.float64)
        penalty = np.asarray([next(kls).sum() for _ in rollout.completions])
        shaped = leave_one_out(rewards - config.kl_coefficient * penalty)
        per_token = tuple(
            np.full(c.token_ids.shape, a, np.float32) for c, a in zip(rollout.completions, shaped, strict=True)
        )
        result.append(dataclasses.replace(rollout, advantages=per_token))
    return result


def token_kls(
    rollouts: Sequence[Rollout],
    config: AlgorithmConfig,
    log_ratios: Sequence[Float[np.ndarray, "completion"]] | None,
) -> list[Float[np.ndarray, "completion"]]:
    """The KL per token that the reward pays for, float64, a row per completion; zeros where it pays for none."""
    completions = [c for rollout in rollouts for c in rollout.completions]
    if config.kl_coefficient <= 0 or config.kl_placement != "reward":
        return [np.zeros(c.token_ids.shape, np.float64) for c in completions]
    if log_ratios is None or len(log_ratios) != len(completions):
        raise ValueError("with the KL in the reward every completion needs its policy and reference log-probs")
    return [kl_per_token(np.asarray(d, np.float64), config.kl_estimator) for d in log_ratios]
