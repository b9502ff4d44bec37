"""RLOO as LMM-R1 computes it (`compute_reward` and the replay buffer of its code).

    r'_i = clip(r_i - mean of the others, -10, 10)
    A_t  = normalised over the batch's tokens( sum over s >= t of discount^(s - t) ([s is last] r'_i - beta kl_s) )

The baseline sees the task's reward alone.
"""

from __future__ import annotations

import functools

from lmmr1_jax.algorithms import shaping
from lmmr1_jax.algorithms.algorithm import Algorithm
from lmmr1_jax.algorithms.policy_losses import clip
from lmmr1_jax.algorithms.rloo import leave_one_out
from lmmr1_jax.algorithms.shaping import shaped_advantages

ALGORITHM = Algorithm(
    "rloo_lmm_r1",
    advantages=functools.partial(shaped_advantages, baseline=leave_one_out, discounted=True),
    loss=clip,
    defaults={
        "normalize_advantages": "batch",
        "reward_clip": 10.0,
        "kl_estimator": "k1",
        "kl_placement": "reward",
    },
    reads={*shaping.READS, "discount"},
)
