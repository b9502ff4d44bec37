"""What the learner and an engine say to each other: plain data, imported on both sides, with neither JAX nor vLLM."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """How an engine is built.

    Attributes:
      dtype: of its weights and products, "float32" or "bfloat16".
      tensor_parallel: devices that share its weights.
      max_num_seqs: completions that it samples at a time.
      max_model_len: tokens of the longest prompt with its completion.
      gpu_memory_utilization: of its device's memory.
      kv_cache_bytes: memory for keys and values, over `gpu_memory_utilization`; 0 leaves it to vLLM.
      enforce_eager: no compilation and no CUDA graphs.
      sleeps: the engine gives its memory back between rollouts.
      seed: of its random numbers.
      banned_ids: ids that are never sampled.
      end_ids: ids that end a completion.
      max_images: of one prompt at most.
      max_pixels: of an image.
      backend: name of the weight-transfer engine.
      cpu_threads: of an engine on a CPU; 0 for one on a GPU.
      arguments: further arguments of vLLM's `EngineArgs`.
    """

    dtype: str
    tensor_parallel: int
    max_num_seqs: int
    max_model_len: int
    gpu_memory_utilization: float
    kv_cache_bytes: int
    enforce_eager: bool
    sleeps: bool
    seed: int
    banned_ids: tuple[int, ...]
    end_ids: tuple[int, ...]
    max_images: int
    max_pixels: int
    backend: str
    cpu_threads: int = 0
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class GroupRequest:
    """A prompt and how often, and how, to go on from it.

    Attributes:
      name: unique among the requests of a run.
      token_ids: int32 `[P]`, every image expanded to its number of image tokens: what the engine's own prompt
        must come out as.
      short_ids: int32 `[S]`, the same with one token per image: what the engine is given.
      images: uint8 `[height, width, 3]` each, at their final sizes.
      completions: how many.
      max_new_tokens: limit of each.
      temperature: 0 is greedy.
      top_p, top_k: 1 and 0 are off.
      ignore_ends: go on to exactly `max_new_tokens` tokens.
      urgent: goes before all that waits.
    """

    name: str
    token_ids: np.ndarray
    short_ids: np.ndarray
    images: tuple[np.ndarray, ...]
    completions: int
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    ignore_ends: bool = False
    urgent: bool = False


@dataclasses.dataclass(frozen=True)
class SampledCompletion:
    """A completion as an engine gives it back; see `lmmr1_jax.types.records.Completion`, whose fields these are."""

    token_ids: np.ndarray
    log_probs: np.ndarray
    finish_reason: str
    policy_version: np.ndarray


@dataclasses.dataclass(frozen=True)
class EngineInfo:
    """Where an engine runs: its machine's name, its process, the version of its software."""

    host: str
    pid: int
    software: str


class EngineFailed(Exception):
    """An engine that can't go on; one line of what its own exception said, which this side may lack the classes of."""


class EngineConfigError(EngineFailed):
    """An engine that can't be what it was told to be, and another in its place could not either: no vLLM there, or one
    that refuses its arguments or has another model than the learner."""


class RequestRefused(Exception):
    """A request that no engine can serve, and that trying again would not help; one line."""
