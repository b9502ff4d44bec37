"""GSPO: GRPO's advantages, and the ratio of a whole completion, its length taken out (Zheng et al. 2025,
arXiv:2507.18071)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lmmr1_jax.algorithms import shaping
from lmmr1_jax.algorithms.algorithm import Algorithm, PerToken
from lmmr1_jax.algorithms.completion_sums import completion_sums
from lmmr1_jax.algorithms.loss_inputs import LossInputs
from lmmr1_jax.algorithms.policy_losses import clipped, ratio
from lmmr1_jax.algorithms.shaping import group_mean_advantages
from lmmr1_jax.config.schema import AlgorithmConfig


def gspo(inputs: LossInputs, config: AlgorithmConfig) -> tuple[PerToken, PerToken]:
    """One ratio for all tokens of a completion, and clipped as by PPO.

        s   = exp(mean over the completion of lp_t - old_t)
        s_t = stopped(s) * p_t / stopped(p_t);  then as `policy_losses.clip`, with s_t for the ratio

    s_t has the value of s and the gradient of s, spread over the tokens (its eq. 14, GSPO-token), so that advantages
    may differ from token to token. With `aggregation sequence` this is eq. 5 of the paper.
    """
    log_ratio = jax.lax.stop_gradient(inputs.log_probs - inputs.old_log_probs)
    length = completion_sums(inputs.mask, inputs.completion)
    mean = completion_sums(log_ratio, inputs.completion) / jnp.maximum(length, 1.0)
    moving = inputs.log_probs - jax.lax.stop_gradient(inputs.log_probs)
    return clipped(ratio(mean + jnp.where(inputs.mask > 0, moving, 0.0)), inputs, config)


ALGORITHM = Algorithm(
    "gspo",
    advantages=group_mean_advantages,
    loss=gspo,
    defaults={"clip_low": 3e-4, "clip_high": 4e-4, "aggregation": "sequence", "normalize_advantages": "group"},
    reads=shaping.READS,
)
