"""Estimators of the KL of the policy to the reference, one number per token."""

from __future__ import annotations

import jax
import numpy as np
from jaxtyping import Float

_EXPONENT_LIMIT = 20.0


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
