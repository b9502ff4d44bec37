"""DAPO: GRPO's advantages with more room above than below in the clip, tokens averaged over the whole batch, dynamic
sampling, and a soft penalty for length (Yu et al. 2025, arXiv:2503.14476).

    A_i  = (r_i - mean of its group) / (std of its group + 1e-9), rewards after `overlong.py`'s penalty (eq. 13)
    loss = mean over all tokens of PPO's clipped surrogate, clipped at 1 - 0.2 and 1 + 0.28 (eq. 8)

Groups without variance are replaced by those of fresh prompts (eq. 11; `rollout.dynamic_sampling`).
"""

from __future__ import annotations

from lmmr1_jax.algorithms import shaping
from lmmr1_jax.algorithms.algorithm import Algorithm
from lmmr1_jax.algorithms.policy_losses import clip
from lmmr1_jax.algorithms.shaping import group_mean_advantages

ALGORITHM = Algorithm(
    "dapo",
    advantages=group_mean_advantages,
    loss=clip,
    defaults={
        "clip_high": 0.28,
        "normalize_advantages": "group",
        "overlong_share": 0.2,
        "dynamic_sampling_rounds": 4,
    },
    reads=shaping.READS,
)
