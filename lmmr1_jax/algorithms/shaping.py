"""From rewards to advantages: the steps that all estimators share, in float64 on the host.

    r    rewards of the completions, normalised over a scope if asked for
    r'   the group's baseline taken off, divided by the group's standard deviation if asked for, clipped
    R_t  -beta kl_t, and r' at the last token
    A_t  sum over s >= t of discount^(s - t) R_s, normalised over all tokens of the step if asked for

An algorithm is its baseline; what else it takes of this, its file says.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from lmmr1_jax.algorithms.kl import kl_per_token
from lmmr1_jax.config.schema import AlgorithmConfig
from lmmr1_jax.types.records import Rollout

Group = Float[np.ndarray, "group"]
Tokens = Float[np.ndarray, "tokens"]

READS = ("kl_placement", "normalize_advantages", "normalize_rewards", "normalize_std", "reward_clip")
"""Fields that `shaped_advantages` reads, for `Algorithm.reads`; `discount` comes to them where it is asked for."""

_STD_FLOOR = 1e-9
_VARIANCE_FLOOR = 1e-8


def shaped_advantages(
    rollouts: Sequence[Rollout],
    config: AlgorithmConfig,
    log_ratios: Sequence[Tokens] | None = None,
    *,
    baseline: Callable[[Group], Group],
    discounted: bool = False,
    kl_under_baseline: bool = False,
) -> list[Rollout]:
    """The rollouts with their advantages, float32, one per token; see the module's docstring for the formula.

    Args:
      rollouts: all groups of a step with their rewards. Groups may have any sizes, down to one and none.
      config: resolved; reads `kl_coefficient`, `kl_estimator`, `kl_placement`, `normalize_rewards`,
        `normalize_advantages`, `normalize_std`, `reward_clip` and, if asked for, `discount`.
      log_ratios: policy minus reference log-probs per completion, groups one after the other; needed when the KL is
        in the reward.
      baseline: a group's rewards with its baseline taken off.
      discounted: sum rewards with `discount`, not with 1.
      kl_under_baseline: take the completion's whole KL off its reward before the baseline; then no token pays for
        its own.
    """
    kls = token_kls(rollouts, config, log_ratios)
    rewards = completion_rewards(rollouts, config.normalize_rewards)
    if kl_under_baseline:
        whole = iter(kl.sum() for kl in kls)
        rewards = [group - config.kl_coefficient * np.asarray([next(whole) for _ in group]) for group in rewards]
        kls = [np.zeros_like(kl) for kl in kls]
    kl, discount = iter(kls), config.discount if discounted else 1.0
    rows = []
    for group in rewards:
        shaped = baseline(group)
        if config.normalize_advantages == "group" and config.normalize_std:
            shaped = shaped / _spread(group)
        if config.reward_clip is not None:
            shaped = np.clip(shaped, -config.reward_clip, config.reward_clip)
        rows += [returns(r, next(kl), config.kl_coefficient, discount) for r in shaped]
    if config.normalize_advantages == "batch":
        rows = normalise_tokens(rows, divide=config.normalize_std)
    return with_advantages(rollouts, rows)


def less_the_mean(rewards: Group) -> Group:
    """r_i - mean of the group; exactly 0 where all are equal, and for a group of one."""
    if rewards.size == 0 or (rewards == rewards[0]).all():
        return np.zeros_like(rewards)
    return rewards - rewards.mean()


group_mean_advantages = functools.partial(shaped_advantages, baseline=less_the_mean)
"""A_i = r_i - mean of its group, and what `normalize_advantages` makes of it; arguments as in `shaped_advantages`."""


def returns(reward: float, kl: Tokens, coefficient: float, discount: float = 1.0) -> Tokens:
    """Sum over s >= t of discount^(s - t) R_s, where R_t = -coefficient kl_t and the last token has the reward too."""
    ahead, result = 0.0, token_rewards(reward, kl, coefficient)
    for t in reversed(range(result.size)):
        ahead = result[t] = result[t] + discount * ahead
    return result


def token_rewards(reward: float, kl: Tokens, coefficient: float) -> Tokens:
    """R_t = -coefficient kl_t + [t is the last token] reward."""
    rewards = -coefficient * np.asarray(kl, np.float64)
    if rewards.size:
        rewards[-1] += reward
    return rewards


def normalise_tokens(rows: Sequence[Tokens], *, divide: bool) -> list[Tokens]:
    """(A - mean) / sqrt(max(var, 1e-8)) over all tokens of all rows; the biased variance. Long rows weigh more."""
    tokens = np.concatenate([np.asarray(row, np.float64) for row in rows]) if rows else np.zeros(0)
    if tokens.size == 0:
        return list(rows)
    scale = 1.0 / np.sqrt(max(tokens.var(), _VARIANCE_FLOOR)) if divide else 1.0
    return [(row - tokens.mean()) * scale for row in rows]


def completion_rewards(rollouts: Sequence[Rollout], scope: str = "none") -> list[Group]:
    """Every group's total rewards, float64; (r - mean) / (std + 1e-9) over the scope "group" or "batch"."""
    groups = [np.asarray([reward.total for reward in rollout.rewards], np.float64) for rollout in rollouts]
    if scope == "group":
        return [less_the_mean(group) / _spread(group) for group in groups]
    if scope == "batch" and groups:
        everyone = np.concatenate(groups)
        scaled = less_the_mean(everyone) / _spread(everyone)
        return np.split(scaled, np.cumsum([group.size for group in groups])[:-1])
    return groups


def token_kls(
    rollouts: Sequence[Rollout], config: AlgorithmConfig, log_ratios: Sequence[Tokens] | None
) -> list[Tokens]:
    """The KL per token that the reward pays for, float64, a row per completion; zeros where it pays for none."""
    completions = [c for rollout in rollouts for c in rollout.completions]
    if config.kl_coefficient <= 0 or config.kl_placement != "reward":
        return [np.zeros(c.token_ids.shape, np.float64) for c in completions]
    if log_ratios is None or len(log_ratios) != len(completions):
        raise ValueError("with the KL in the reward every completion needs its policy and reference log-probs")
    return [kl_per_token(np.asarray(d, np.float64), config.kl_estimator) for d in log_ratios]


def with_advantages(rollouts: Sequence[Rollout], rows: Sequence[Tokens]) -> list[Rollout]:
    """The rollouts with a row of advantages for every completion, groups one after the other."""
    row = iter(rows)
    return [
        dataclasses.replace(r, advantages=tuple(np.asarray(next(row), np.float32) for _ in r.completions))
        for r in rollouts
    ]


def _spread(rewards: Group) -> float:
    """What a scope's rewards are divided by: their unbiased standard deviation + 1e-9, 1 where they don't differ."""
    if rewards.size == 0 or (rewards == rewards[0]).all():
        return 1.0
    return float(rewards.std(ddof=1)) + _STD_FLOOR
