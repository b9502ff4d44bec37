"""DAPO's soft overlong penalty: a completion that nears the length limit pays for it (Yu et al. 2025,
arXiv:2503.14476, eq. 13)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from lmmr1_jax.config.schema import AlgorithmConfig
from lmmr1_jax.types.records import Reward, Rollout


def overlong(length: int, limit: int, share: float) -> float:
    """From 0, up to (1 - share) * limit tokens, down to -1 at the limit, in a straight line."""
    buffer = share * limit
    return -min(max(length - (limit - buffer), 0.0) / buffer, 1.0) if buffer > 0 else 0.0


def with_overlong_penalty(rollouts: Sequence[Rollout], config: AlgorithmConfig, limit: int) -> list[Rollout]:
    """The rollouts with the part `overlong` in every reward, and in its total, times `overlong_penalty`; a completion
    that could not be judged stays at 0.

    Args:
      rollouts: groups with their rewards.
      config: resolved; reads `overlong_share` and `overlong_penalty`. A share of 0 changes nothing.
      limit: `rollout.max_new_tokens`.
    """
    if not config.overlong_share:
        return list(rollouts)

    def penalised(reward: Reward, length: int) -> Reward:
        part = overlong(length, limit, config.overlong_share)
        total = reward.total if reward.fault else reward.total + config.overlong_penalty * part
        return dataclasses.replace(reward, total=total, parts=reward.parts | {"overlong": part})

    return [
        dataclasses.replace(
            rollout,
            rewards=tuple(
                penalised(reward, len(completion.token_ids))
                for reward, completion in zip(rollout.rewards, rollout.completions, strict=True)
            ),
        )
        for rollout in rollouts
    ]
