"""RLOO as LMM-R1 computes it: shaped reward clipped, KL per token after the baseline, normalised over all tokens."""

from __future__ import annotations

from collections.abc import Sequence

from lmmr1_jax.algorithms.rloo import leave_one_out
from lmmr1_jax.algorithms.shaping import Tokens, shaped_advantages
from lmmr1_jax.config.schema import AlgorithmConfig
from lmmr1_jax.types.records import Rollout


def advantages(
    rollouts: Sequence[Rollout], config: AlgorithmConfig, log_ratios: Sequence[Tokens] | None = None
) -> list[Rollout]:
    """As `compute_reward` and the replay buffer of LMM-R1 make them:

        r'_i = clip(r_i - mean of the others, -10, 10)
        A_t  = normalised over the batch's tokens( sum over s >= t of discount^(s - t) ([s is last] r'_i - beta kl_s) )

    The baseline sees the task reward alone. Arguments as in `shaped_advantages`; reads `discount` too.
    """
    return shaped_advantages(rollouts, config, log_ratios, leave_one_out, discount=config.discount)
