"""The KL of the policy to the reference: its estimators, one number per token, and the coefficient that adapts."""

from __future__ import annotations

import math

import jax
import numpy as np
from jaxtyping import Float

_EXPONENT_LIMIT = 20.0
_LARGEST_ERROR = 0.2


def kl_per_token(log_ratio: Float[np.ndarray | jax.Array, "..."], estimator: str) -> Float[jax.Array, "..."]:
    """Schulman's estimators (http://joschu.net/blog/kl-approx.html) from d = log policy - log reference.

    k1 = d, unbiased; k2 = d^2 / 2, biased, small variance, its gradient is unbiased; k3 = exp(-d) - 1 + d, unbiased
    and never negative. k3's exponent is held within +-20, where it is no estimate any more, so that one token can't
    turn a loss to infinity.

    Takes NumPy and JAX arrays alike and returns the same kind, in the same dtype.
    """
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio * log_ratio
    if estimator == "k3":
        arrays = log_ratio.__array_namespace__()
        return arrays.expm1(-arrays.clip(log_ratio, -_EXPONENT_LIMIT, _EXPONENT_LIMIT)) + log_ratio
    raise ValueError(f"unknown KL estimator {estimator!r}: k1, k2 or k3")


def adapted_coefficient(coefficient: float, kl: float, *, target: float, horizon: float, completions: int) -> float:
    """The KL's coefficient after a step: beta (1 + clip(kl / target - 1, -0.2, 0.2) completions / horizon).

    (Ziegler et al. 2019, arXiv:1909.08593, sec. 2.2; LMM-R1's and OpenRLHF's adaptive controller.) A KL that is no
    number, in a step that skipped its update, changes nothing.

    Args:
      coefficient: beta.
      kl: mean KL per token of the step, in nats.
      target: the KL to hold.
      horizon: completions over which an error is made good.
      completions: in the step.
    """
    if not math.isfinite(kl):
        return coefficient
    error = min(max(kl / target - 1.0, -_LARGEST_ERROR), _LARGEST_ERROR)
    return coefficient * (1.0 + error * min(completions / horizon, 1.0))
