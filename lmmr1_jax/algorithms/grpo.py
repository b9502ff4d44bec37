"""GRPO: rewards normalised within their group (Shao et al. 2024, DeepSeekMath, arXiv:2402.03300).

    A_i  = (r_i - mean of its group) / (std of its group + 1e-9), the unbiased standard deviation
    loss = mean over completions of the mean over their tokens of PPO's clipped surrogate + beta k3

A group whose rewards are all equal, or that has one member, has advantages of exactly 0.
"""

from __future__ import annotations

from lmmr1_jax.algorithms import shaping
from lmmr1_jax.algorithms.algorithm import Algorithm
from lmmr1_jax.algorithms.policy_losses import clip
from lmmr1_jax.algorithms.shaping import group_mean_advantages

ALGORITHM = Algorithm(
    "grpo",
    advantages=group_mean_advantages,
    loss=clip,
    defaults={"aggregation": "sequence", "normalize_advantages": "group"},
    reads=shaping.READS,
)
