"""PPO (Schulman et al. 2017, arXiv:1707.06347): its clipped surrogate, with advantages from a critic's values by
generalised advantage estimation (Schulman et al. 2015, arXiv:1506.02438).

    values per completion token  ->  advantages (in the rollouts) and returns (what the critic is fitted to)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lmmr1_jax.algorithms import shaping
from lmmr1_jax.algorithms.algorithm import Algorithm
from lmmr1_jax.algorithms.policy_losses import clip
from lmmr1_jax.algorithms.shaping import (
    Tokens,
    completion_rewards,
    normalise_tokens,
    token_kls,
    token_rewards,
    with_advantages,
)
from lmmr1_jax.config.schema import AlgorithmConfig
from lmmr1_jax.types.records import Rollout


def generalised_advantages(
    rewards: Tokens, values: Tokens, *, discount: float, gae_lambda: float
) -> tuple[Tokens, Tokens]:
    """Advantages and returns of one completion, float64.

        delta_t = R_t + discount V_{t+1} - V_t;  A_t = delta_t + discount lambda A_{t+1};  return_t = A_t + V_t

    V past the end is 0, whether the completion ended or was cut.

    Args:
      rewards: R_t, see `shaping.token_rewards`.
      values: V_t, the critic's value of the state in which token t is chosen.
    """
    values = np.asarray(values, np.float64)
    following = np.append(values[1:], 0.0) if values.size else values
    advantages = np.asarray(rewards, np.float64) + discount * following - values
    ahead = 0.0
    for t in reversed(range(advantages.size)):
        ahead = advantages[t] = advantages[t] + discount * gae_lambda * ahead
    return advantages, advantages + values


def advantages_and_returns(
    rollouts: Sequence[Rollout],
    config: AlgorithmConfig,
    log_ratios: Sequence[Tokens] | None,
    values: Sequence[Tokens],
) -> tuple[list[Rollout], list[Tokens]]:
    """The rollouts with their advantages, and the returns, float32, a row per completion.

    Rewards are clipped where `reward_clip` says so; advantages, not returns, are normalised over the batch's tokens
    for `normalize_advantages batch`.

    Args:
      rollouts, config, log_ratios: as in `shaping.shaped_advantages`; reads `discount` and `gae_lambda` too.
      values: the critic's values of every completion's tokens, groups one after the other.
    """
    rewards = np.concatenate([np.zeros(0), *completion_rewards(rollouts, config.normalize_rewards)])
    if config.reward_clip is not None:
        rewards = np.clip(rewards, -config.reward_clip, config.reward_clip)
    kls = token_kls(rollouts, config, log_ratios)
    made = [
        generalised_advantages(
            token_rewards(reward, kl, config.kl_coefficient),
            row,
            discount=config.discount,
            gae_lambda=config.gae_lambda,
        )
        for reward, kl, row in zip(rewards, kls, values, strict=True)
    ]
    rows = [advantages for advantages, _ in made]
    if config.normalize_advantages == "batch":
        rows = normalise_tokens(rows, divide=config.normalize_std)
    return with_advantages(rollouts, rows), [returns.astype(np.float32) for _, returns in made]


ALGORITHM = Algorithm(
    "ppo",
    advantages=advantages_and_returns,
    loss=clip,
    defaults={"normalize_advantages": "batch", "kl_estimator": "k1", "kl_placement": "reward"},
    reads={*shaping.READS, "discount", "gae_lambda"},
    smallest_group=1,
    critic=True,
)


def critic_metrics(values: Sequence[Tokens], returns: Sequence[Tokens]) -> dict[str, float]:
    """How good the values were that the advantages were made with, over all tokens: `value/mean`, `value/return`, and
    `value/explained_variance`, 1 - Var(return - value) / Var(return), which is NaN where all returns are equal."""
    v, r = (np.concatenate([np.zeros(0), *rows]).astype(np.float64) for rows in (values, returns))
    explained = 1.0 - float(np.var(r - v) / np.var(r)) if r.size and (r != r[0]).any() else float("nan")
    return {
        "value/mean": float(v.mean()) if v.size else float("nan"),
        "value/return": float(r.mean()) if r.size else float("nan"),
        "value/explained_variance": explained,
    }
