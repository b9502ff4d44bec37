"""Dr. GRPO: GRPO without the two divisions that bias it (Liu et al. 2025, arXiv:2503.20783).

    A_i = r_i - mean of its group

Dividing by the group's standard deviation favours prompts that are nearly always or nearly never solved; dividing by a
completion's own length makes wrong completions longer, so the loss divides by a constant length (`aggregation
constant`).
"""

from __future__ import annotations

from lmmr1_jax.algorithms import shaping
from lmmr1_jax.algorithms.algorithm import Algorithm
from lmmr1_jax.algorithms.policy_losses import clip
from lmmr1_jax.algorithms.shaping import group_mean_advantages

ALGORITHM = Algorithm(
    "dr_grpo",
    advantages=group_mean_advantages,
    loss=clip,
    defaults={"aggregation": "constant"},
    reads=shaping.READS,
)
