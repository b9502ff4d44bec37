"""What the critic is fitted by: the clipped squared error of its values, as in the code of PPO's authors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

METRICS = ("loss/value", "value/clip_fraction")
"""What a value loss tells."""


def value_loss(
    values: Float[Array, "rows slots"],
    old_values: Float[Array, "rows slots"],
    returns: Float[Array, "rows slots"],
    mask: Float[Array, "rows slots"],
    tokens_total: Float[Array, ""],
    clip: float,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """This micro-batch's share of the minibatch's loss, and its shares of the metrics.

        v'   = clip(v, v_old - clip, v_old + clip)
        loss = mean over the minibatch's tokens of 0.5 max((v - return)^2, (v' - return)^2)

    A value that has moved further than the clip, and is closer to its return for it, has no gradient. The counterpart
    of the policy's clip in OpenAI's baselines (github.com/openai/baselines, ppo2); the paper has the plain square.

    Args:
      values: by the parameters being trained; float32.
      old_values: by those of the rollout, from which the returns were made.
      returns: what to predict.
      mask: 1 at completion tokens.
      tokens_total: completion tokens of the whole minibatch.
      clip: 0 is the plain square.
    """
    # Before anything is computed: a padding slot may hold an infinity, and 0 * inf is not 0.
    values = jnp.where(mask > 0, values, 0.0)
    error = jnp.square(values - returns)
    clipped = jnp.square(old_values + jnp.clip(values - old_values, -clip, clip) - returns) if clip else error
    share = mask / tokens_total
    loss = 0.5 * jnp.sum(jnp.maximum(error, clipped) * share)
    held_back = jnp.sum((clipped > error) * share)
    return loss, jax.lax.stop_gradient(dict(zip(METRICS, (loss, held_back), strict=True)))
