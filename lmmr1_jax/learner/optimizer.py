"""AdamW with a warm-up and a cosine, as plain functions over the trainable part of the parameters."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from lmmr1_jax.config.schema import LearnerConfig

# Norm scales and biases are not decayed: pulling them to zero regularises nothing.
_DECAYED = ("kernel", "embedding")


def learning_rate(update: Int[Array, ""] | int, config: LearnerConfig, total_updates: int) -> Float[Array, ""]:
    """The learning rate of the update with that number, counted from 0.

    Rises linearly over the first w = ceil(warmup_ratio * total) updates, reaching the peak in the w-th (so that the
    first update moves something), then follows a cosine down to min_learning_rate_ratio * peak in the last.
    """
    total = max(total_updates, 1)
    warmup = min(math.ceil(config.warmup_ratio * total), total)
    number = jnp.asarray(update, jnp.float32) + 1.0
    rising = number / max(warmup, 1)
    progress = jnp.clip((number - warmup) / max(total - warmup, 1), 0.0, 1.0)
    floor = config.min_learning_rate_ratio
    falling = floor + (1.0 - floor) * 0.5 * (1.0 + jnp.cos(math.pi * progress))
    return config.learning_rate * jnp.where(number <= warmup, rising, falling)


def adam(config: LearnerConfig) -> optax.GradientTransformation:
    """Adam's moments, float32 like the parameters; its state is an `optax.ScaleByAdamState`."""
    return optax.scale_by_adam(b1=config.adam_b1, b2=config.adam_b2, eps=config.adam_eps)


def global_norm(gradients: Any) -> Float[Array, ""]:
    """The Euclidean norm of all gradients together, in float32."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(gradients)))


def apply(
    params: Any,
    gradients: Any,
    moments: optax.ScaleByAdamState,
    config: LearnerConfig,
    rate: Float[Array, ""],
    norm: Float[Array, ""],
) -> tuple[Any, optax.ScaleByAdamState]:
    """One AdamW update (Loshchilov & Hutter, arXiv:1711.05101) of gradients clipped to a global norm.

        g <- g * min(1, max_grad_norm / norm);  p <- p - rate * (adam(g) + weight_decay * p)

    Args:
      params, gradients, moments: trees of one structure, the trainable part alone.
      rate: this update's learning rate.
      norm: the gradients' global norm before clipping.
    """
    scale = jnp.where(norm > config.max_grad_norm, config.max_grad_norm / norm, 1.0)
    gradients = jax.tree.map(lambda g: g * scale, gradients)
    steps, moments = adam(config).update(gradients, moments)

    def move(path, param, step):
        if config.weight_decay and path[-1].key in _DECAYED:
            step = step + config.weight_decay * param
        return param - rate * step

    return jax.tree_util.tree_map_with_path(move, params, steps), moments


def split_frozen(params: dict[str, Any], freeze_vision: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters that are trained and those that are not; together they are `params` again."""
    frozen = {name: tree for name, tree in params.items() if freeze_vision and name == "vision"}
    return {name: tree for name, tree in params.items() if name not in frozen}, frozen
