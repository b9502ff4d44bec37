"""The small parts that decoder and vision tower share: modules that hold parameters, norms, rotations, activations.

Parameters are float32 and live under the names of the parameter tree; a module that is stacked has the number of
layers in front of every shape. Matrix products run in the compute dtype, norms and rotations in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

Stack = tuple[int, ...]
"""Leading axes of stacked parameters: () or (layers,)."""


def parameter(*shape: int) -> nnx.Param:
    """A float32 parameter; `Network.init` gives values, here it is only a shape."""
    return nnx.Param(jnp.zeros(shape, jnp.float32))


def bind(graphdef: nnx.GraphDef, params: Mapping[str, Any]) -> Any:
    """The module of this structure with these parameters (or tracers of them) in place."""
    return nnx.merge(graphdef, nnx.State(jax.tree.map(nnx.Param, dict(params))))


class Linear(nnx.Module):
    """x @ kernel + bias in the compute dtype."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, dtype: jnp.dtype, stack: Stack = ()):
        self.kernel = parameter(*stack, inputs, outputs)
        if bias:
            self.bias = parameter(*stack, outputs)
        self.has_bias = bias
        self.dtype = dtype

    def __call__(self, x: Float[Array, "... inputs"]) -> Float[Array, "... outputs"]:
        y = product(x, self.kernel[...].astype(self.dtype))
        return y + self.bias[...].astype(self.dtype) if self.has_bias else y


def product(x: Float[Array, "*batch inputs"], kernel: Float[Array, "inputs outputs"]) -> Float[Array, "*batch outputs"]:
    """x @ kernel over flattened tokens. The kernel's gradient then contracts one axis and not two, for which XLA's
    CPU products would have the activations transposed first, fused with, and as slow as, what computes them."""
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale, the normalisation in float32."""

    def __init__(self, width: int, eps: float, *, stack: Stack = ()):
        self.scale = parameter(*stack, width)
        self.eps = eps

    def __call__(self, x: Float[Array, "... width"]) -> Float[Array, "... width"]:
        return rms_norm(x, self.scale[...], self.eps)


def rms_norm(x: Float[Array, "... width"], scale: Float[Array, " width"], eps: float) -> Float[Array, "... width"]:
    """What `RMSNorm` computes; in x's dtype (https://arxiv.org/abs/1910.07467)."""
    x_f32 = x.astype(jnp.float32)
    normed = x_f32 * jax.lax.rsqrt(jnp.mean(x_f32 * x_f32, -1, keepdims=True) + eps)
    return (normed.astype(x.dtype) * scale).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(variance + eps) * scale + bias in float32."""

    def __init__(self, width: int, eps: float, *, stack: Stack = ()):
        self.scale = parameter(*stack, width)
        self.bias = parameter(*stack, width)
        self.eps = eps

    def __call__(self, x: Float[Array, "... width"]) -> Float[Array, "... width"]:
        x_f32 = x.astype(jnp.float32)
        centred = x_f32 - jnp.mean(x_f32, -1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(centred * centred, -1, keepdims=True) + self.eps)
        return (normed * self.scale[...] + self.bias[...]).astype(x.dtype)


class Embedding(nnx.Module):
    """A table of rows, `[vocabulary, width]`."""

    def __init__(self, rows: int, width: int):
        self.embedding = parameter(rows, width)


def inverse_frequencies(width: int, theta: float) -> np.ndarray:
    """theta^(-2i / width) for i < width / 2, float32 throughout as in transformers."""
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    return (np.float32(1) / np.float32(theta) ** exponents).astype(np.float32)


def rotate(
    x: Float[Array, "*batch heads width"], cos: Float[Array, "*batch half"], sin: Float[Array, "*batch half"]
) -> Float[Array, "*batch heads width"]:
    """Rotate the pairs (x[i], x[i + width / 2]) by their angles, in float32."""
    cos, sin = cos[..., None, :], sin[..., None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


def activation(name: str, x: Array) -> Array:
    """transformers' activations by their names there; its `gelu` is the exact one, by the error function."""
    if name == "silu":
        return jax.nn.silu(x)
    if name == "quick_gelu":
        return x * jax.nn.sigmoid(1.702 * x)
    if name == "gelu":
        return jax.nn.gelu(x, approximate=False)
    raise ValueError(name)
