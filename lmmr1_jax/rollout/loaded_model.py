"""A model's folder, opened: what a sampler, a learner and a command work with. Parameters are read by `load`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lmmr1_jax.config.schema import DataConfig, ModelConfig, TrainConfig
from lmmr1_jax.data.processor import Processor
from lmmr1_jax.models.attention.backends import resolve
from lmmr1_jax.models.network import Network, build
from lmmr1_jax.parallel.sharding import activation_constraint, make_mesh, sharding_of
from lmmr1_jax.runtime.compilation import enable_compilation_cache
from weights_bridge.architecture import num_heads_by_axis
from weights_bridge.load import load
from weights_bridge.tensor_table import layout, logical_axes

TINY_MODEL = Path(__file__).parents[1] / "assets" / "tiny"
EMBEDDED_MODEL = "embedded:tiny"


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model on its devices, and all that works with it but its parameters.

    Attributes:
      processor: text to tokens, images to patches.
      network: the model without parameters.
      mesh: the devices.
      source: the folder that the parameters come from.
    """

    processor: Processor
    network: Network
    mesh: Mesh
    source: Path

    def load(self, dtype: Any = jnp.float32) -> dict[str, Any]:
        """The checkpoint's parameters in `dtype`, sharded over the mesh."""
        return load(self.source, sharding_of(self.mesh, num_heads=num_heads_by_axis(self.network.config)), dtype=dtype)

    def axes(self) -> dict[str, Any]:
        """Logical axes of every parameter."""
        return logical_axes(layout(self.network.config))


def model_folder(config: ModelConfig) -> Path:
    """The starting checkpoint: the config's, or the tiny one that ships with the package."""
    if config.path in ("", EMBEDDED_MODEL):
        return TINY_MODEL
    return Path(config.path)


def read_processor(config: TrainConfig) -> Processor:
    """The processor of the model's folder; reads `model` and `data`."""
    data: DataConfig = config.data
    return Processor(
        model_folder(config.model),
        min_pixels=data.min_pixels,
        max_pixels=data.max_pixels,
        max_prompt_tokens=data.max_prompt_tokens,
        allow_http=data.allow_http,
        image_root=data.image_root or None,
    )


def load_model(config: TrainConfig, processor: Processor | None = None) -> LoadedModel:
    """Reads the model's folder and builds the network; JAX looks for its devices here.

    Args:
      config: reads `model`, `data`, `mesh` and `learner.remat`.
      processor: of `read_processor`, where it was read before.
    """
    enable_compilation_cache()
    processor = processor or read_processor(config)
    mesh = make_mesh(config.mesh)
    dtype = compute_dtype(config.model)
    network = build(
        processor.config,
        dtype,
        config.learner.remat,
        activation_constraint(mesh),
        resolve(config.model.attention),
    )
    return LoadedModel(processor, network, mesh, model_folder(config.model))


def compute_dtype(config: ModelConfig) -> Any:
    """The dtype of matrix products."""
    if config.compute_dtype == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return jnp.dtype(config.compute_dtype)
