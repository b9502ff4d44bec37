"""REINFORCE++-baseline: the group's mean taken off, then the batch's standard deviation (Hu et al. 2025,
arXiv:2501.03262, section on "REINFORCE++ with baseline").

    r'_i = r_i - mean of its group;  A = (r' - mean) / std over the batch's tokens

The group says what its prompt is worth, the batch how large rewards are: a group in which one completion differs by
little is not blown up, as it is by GRPO.
"""

from __future__ import annotations

from lmmr1_jax.algorithms import shaping
from lmmr1_jax.algorithms.algorithm import Algorithm
from lmmr1_jax.algorithms.policy_losses import clip
from lmmr1_jax.algorithms.shaping import group_mean_advantages

ALGORITHM = Algorithm(
    "reinforce_pp_baseline",
    advantages=group_mean_advantages,
    loss=clip,
    defaults={"normalize_advantages": "batch", "kl_estimator": "k2", "kl_placement": "loss"},
    reads=shaping.READS,
)
