"""REINFORCE++: no baseline but the batch's mean, KL per token (Hu et al. 2025, arXiv:2501.03262).

    G_t = sum over s >= t of discount^(s - t) ([s is last] r_i - beta kl_s)
    A   = (G - mean) / std over the batch's tokens

One completion per prompt is enough.
"""

from __future__ import annotations

import functools

from lmmr1_jax.algorithms import shaping
from lmmr1_jax.algorithms.algorithm import Algorithm
from lmmr1_jax.algorithms.policy_losses import clip
from lmmr1_jax.algorithms.shaping import shaped_advantages

ALGORITHM = Algorithm(
    "reinforce_pp",
    advantages=functools.partial(shaped_advantages, baseline=lambda rewards: rewards, discounted=True),
    loss=clip,
    defaults={"normalize_advantages": "batch", "kl_estimator": "k1", "kl_placement": "reward"},
    reads={*shaping.READS, "discount"},
    smallest_group=1,
)
