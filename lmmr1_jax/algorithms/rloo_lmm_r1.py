"""RLOO as LMM-R1 computes it: shaped reward clipped, KL per token after the baseline, normalised over all tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from lmmr1_jax.algorithms.rloo import leave_one_out, token_kls
from lmmr1_jax.config import AlgorithmConfig
from lmmr1_jax.types import Rollout

_VARIANCE_FLOOR = 1e-8


def returns(shaped_reward: float, kl: Float[np.ndarray, "tokens"], coefficient: float) -> Float[np.ndarray, "tokens"]:
    """Undiscounted returns of R_t = -beta kl_t + [t is the last token] r'; return_t = sum over s >= t of R_s."""
    token_rewards = -coefficient * np.asarray(kl, np.float64)
    if token_rewards.size:
        token_rewards[-1] += shaped_reward
    return np.cumsum(token_rewards[::-1])[::-1]


def normalise(rows: Sequence[Float[np.ndarray, "tokens"]], *, divide: bool) -> list[Float[np.ndarray, "tokens"]]:
    """(A - mean) / sqrt(max(var, 1e-8)) over all tokens of all rows; the biased variance. Long rows weigh more."""
    tokens = np.concatenate([np.asarray(row, np.float64) for row in rows]) if rows else np.zeros(0)
    if tokens.size == 0:
        return list(rows)
    scale = 1.0 / np.sqrt(max(tokens.var(), _VARIANCE_FLOOR)) if divide else 1.0
    return [(row - tokens.mean()) * scale for row in rows]


def advantages(
    rollouts: Sequence[Rollout],
    config: AlgorithmConfig,
    log_ratios: Sequence[Float[np.ndarray, "completion"]] | None = None,
) -> list[Rollout]:
    """The same rollouts with their advantages, as `compute_reward` and the replay buffer of LMM-R1 make them.

        r'_i = clip(r_i - mean of the others, -reward_clip, reward_clip)
        A_t  = normalised( r'_i - beta * sum over s >= t of kl_s )

    The baseline sees the task reward alone. `normalize_std` off keeps the subtraction of the mean.

    Args and order of `log_ratios` as in `rloo.advantages`; reads `reward_clip` and `normalize_std` too.
    """
    kls = iter(token_kls(rollouts, config, log_ratios))
    rows = []
    for rollout in rollouts:
        shaped = leave_one_out(np.asarray([r.total for r in rollout.rewards], np.float64))
        shaped = np.clip(shaped, -config.reward_clip, config.reward_clip)
        rows += [returns(r, next(kls), config.kl_coefficient) for r in shaped]
    normalised = iter(normalise(rows, divide=config.normalize_std))
    return [
        dataclasses.replace(r, advantages=tuple(next(normalised).astype(np.float32) for _ in r.completions))
        for r in rollouts
    ]
