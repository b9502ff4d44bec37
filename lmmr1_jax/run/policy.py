"""The model that is trained, with all that works with it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lmmr1_jax.config.schema import ModelConfig, TrainConfig
from lmmr1_jax.data.processor import Processor
from lmmr1_jax.models.network import Network, build
from lmmr1_jax.parallel.sharding import activation_constraint, head_units, make_mesh, sharding_of
from lmmr1_jax.rollout.engines.open import open_engines
from lmmr1_jax.rollout.engines.ray_cluster import connected
from lmmr1_jax.rollout.local.sampler import JaxSampler
from lmmr1_jax.rollout.sampler import Sampler, apply_limits
from lmmr1_jax.runtime.compilation import enable_compilation_cache
from weights_bridge.load import load
from weights_bridge.tensor_table import layout, logical_axes

TINY_MODEL = Path(__file__).parents[1] / "assets" / "tiny"
EMBEDDED_MODEL = "embedded:tiny"


def model_folder(config: ModelConfig) -> Path:
    """The starting checkpoint: the config's, or the tiny one that ships with the package."""
    if config.path in ("", EMBEDDED_MODEL):
        return TINY_MODEL
    return Path(config.path)


@dataclasses.dataclass(frozen=True)
class PolicyModel:
    """A model on its devices, and all that works with it.

    Attributes:
      processor: text to tokens, images to patches.
      network: the model without parameters.
      mesh: the devices.
      sampler: the built-in one or vLLM's engines; it has no weights yet.
      source: the folder that the parameters come from.
    """

    processor: Processor
    network: Network
    mesh: Mesh
    sampler: Sampler
    source: Path

    def load(self) -> dict[str, Any]:
        """The checkpoint's parameters, float32, sharded over the mesh."""
        return load(self.source, sharding_of(self.mesh, units=head_units(self.network.config)))

    def axes(self) -> dict[str, Any]:
        """Logical axes of every parameter."""
        return logical_axes(layout(json.loads((self.source / "config.json").read_text(encoding="utf-8"))))


@contextlib.contextmanager
def open_policy(
    config: TrainConfig, *, resumed_at: int = 0, check: Callable[[], None] = lambda: None
) -> Iterator[PolicyModel]:
    """The policy with the sampler that the config names; engines start here and end with the context.

    Args:
      resumed_at, check: see `open_engines`; `check` also while Ray is waited for.
    """
    if config.rollout.sampler == "jax":
        yield assemble_policy(config)
        return
    # Ray first: it starts processes, which a process that runs JAX should not.
    with connected(config.ray, cpus=config.vllm.num_engines * config.vllm.cpus, check=check):
        policy = assemble_policy(config)
        parts = (config, policy.processor, policy.network, policy.source)
        with open_engines(*parts, resumed_at=resumed_at, check=check) as sampler:
            apply_limits(policy.processor, sampler.limits)
            yield dataclasses.replace(policy, sampler=sampler)


def assemble_policy(config: TrainConfig) -> PolicyModel:
    """Reads the model's folder and builds what samples from it on the learner's devices."""
    enable_compilation_cache()
    source, data = model_folder(config.model), config.data
    processor = Processor(
        source,
        min_pixels=data.min_pixels,
        max_pixels=data.max_pixels,
        max_prompt_tokens=data.max_prompt_tokens,
        allow_http=data.allow_http,
        image_root=data.image_root or None,
    )
    mesh = make_mesh(config.mesh)
    network = build(
        processor.config, compute_dtype(config.model), config.learner.remat, activation_constraint(mesh)
    )
    sampler = JaxSampler(
        network,
        banned_ids=processor.banned_ids,
        end_ids=processor.end_ids,
        patches_of=processor.patches,
        mesh=mesh,
    )
    return PolicyModel(processor, network, mesh, sampler, source)


def compute_dtype(config: ModelConfig) -> Any:
    """The dtype of matrix products."""
    if config.compute_dtype == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return jnp.dtype(config.compute_dtype)
