"""AdamW with a warm-up and a cosine, as optax transformations."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from lmmr1_jax.models.network import Params

# Norm scales and biases are not decayed: pulling them to zero regularises nothing.
_DECAYED = ("kernel", "embedding")


def adamw(
    schedule: optax.Schedule, *, b1: float, b2: float, eps: float, weight_decay: float, max_grad_norm: float
) -> optax.GradientTransformationExtraArgs:
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101) of gradients clipped to a global norm.

        g <- g * min(1, max_grad_norm / norm);  p <- p - rate * (adam(g) + weight_decay * p)

    Kernels and embeddings are decayed. Moments are float32 like the parameters.

    Args:
      schedule: the rate of an update by its number, from 0.
      b1, b2, eps: Adam's.
      weight_decay: decoupled from the gradient; 0 decays nothing.
      max_grad_norm: gradients are scaled down to this global norm.
    """
    # Named, so that a checkpoint holds "opt_state/adam" wherever in the chain that stands.
    return optax.named_chain(
        ("clip", clip_by_global_norm(max_grad_norm)),
        ("adam", optax.scale_by_adam(b1=b1, b2=b2, eps=eps)),
        ("weight_decay", optax.add_decayed_weights(weight_decay, mask=_is_decayed)),
        ("learning_rate", scale_by_schedule_of_step(schedule)),
    )


def warmup_cosine(
    peak: float, total_updates: int, *, warmup_ratio: float, min_learning_rate_ratio: float
) -> optax.Schedule:
    """The learning rate of an update by its number, from 0.

    Rises linearly over the first w = ceil(warmup_ratio * total) updates, reaching the peak in the w-th (so that the
    first update moves something), then follows a cosine down to min_learning_rate_ratio * peak in the last.
    """
    total = max(total_updates, 1)
    warmup = min(math.ceil(warmup_ratio * total), total)
    floor = min_learning_rate_ratio

    def learning_rate(update: Int[Array, ""] | int) -> Float[Array, ""]:
        number = jnp.asarray(update, jnp.float32) + 1.0
        rising = number / max(warmup, 1)
        progress = jnp.clip((number - warmup) / max(total - warmup, 1), 0.0, 1.0)
        falling = floor + (1.0 - floor) * 0.5 * (1.0 + jnp.cos(math.pi * progress))
        return peak * jnp.where(number <= warmup, rising, falling)

    return learning_rate


def global_norm(gradients: Any) -> Float[Array, ""]:
    """The Euclidean norm of all gradients together, in float32."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(gradients)))


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales gradients down to a global norm; optax's divides each gradient by the norm, which rounds otherwise."""

    def update(gradients: Params, state: optax.EmptyState, params: Params | None = None):
        norm = global_norm(gradients)
        scale = jnp.where(norm > max_norm, max_norm / norm, 1.0)
        return jax.tree.map(lambda g: g * scale, gradients), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def scale_by_schedule_of_step(schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """Multiplies by minus the learning rate at the keyword `step`, the number of the learner's update.

    optax's `scale_by_schedule` counts the updates that it has seen itself. Here updates that were skipped count too, so
    that a run's last update is always at the schedule's end.
    """

    def update(updates: Params, state: optax.EmptyState, params: Params | None = None, *, step: Array, **_: Any):
        rate = schedule(step)
        return jax.tree.map(lambda u: -(rate * u), updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _is_decayed(params: Params) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in _DECAYED, params)
