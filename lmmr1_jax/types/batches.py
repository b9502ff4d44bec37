"""What goes into jitted functions: NumPy arrays on the host that are JAX pytrees as well."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class VisionBatch:
    """Patches of many images in rows of fixed length, with all their geometry as data.

    A row holds whole images one after the other and is attended to on its own. Where the tower has windows,
    patches stand window by window and each window is padded to its full number of patches (64 for Qwen2.5-VL).
    Four neighbouring slots merge into one token.

    Attributes:
      patches: float32 `[..., rows, slots, patch_values]` (1176 values for 14x14 patches of two RGB frames).
      coordinates: int32 `[..., rows, slots, 2]`, the patch's row and column in its image, for the rotary embedding.
      low, high: int32 `[..., rows, slots]`, the slots from `low` to before `high` are the patch's frame; both 0 at
        padding (see `models.attention.mask`).
    """

    patches: np.ndarray
    coordinates: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """A minibatch as the learner takes it: micro-batches of rows of fixed length, padded to a fixed number.

    In a row a group's prompt stands once and its completions follow. A prompt's token is seen by what follows it in
    the group, a completion's by what follows it in the completion. What is predicted lives in response slots: slot m
    of a row predicts `target[m]` from the hidden state at `source[m]`; the first token of every completion is
    predicted from the prompt's last token.

    n = micro-batches, R = rows, L = row length, M = response slots of a row.

    Attributes:
      tokens: int32 `[n, R, L]`.
      low, high: int32 `[n, R, L]`, the queries of the row, from `low` to before `high`, that see this token; both 0
        at padding (see `models.attention.mask`).
      positions: int32 `[n, 3, R, L]`.
      image_slots: int32 `[n, R, L]`, index of the merged image token (over the micro-batch's vision rows,
        flattened) that stands here, -1 where text stands.
      source: int32 `[n, R, M]`.
      target: int32 `[n, R, M]`.
      mask: float32 `[n, R, M]`, 1 where a slot holds a completion token.
      completion: int32 `[n, R, M]`, number of the completion within the minibatch, -1 for padding.
      advantages, old_log_probs, sampler_log_probs, reference_log_probs: float32 `[n, R, M]`, 0 at padding.
      vision: `[n, ...]` vision rows, or None for a batch without images.
      micro_batches: int32 `[]`, how many of the n hold anything.
      tokens_total: float32 `[]`, completion tokens in the whole minibatch.
      completions_total: float32 `[]`, completions in the whole minibatch.
      kl_coefficient: float32 `[]`, of the KL in the loss; 0 until the step has set it.
      values, returns: float32 `[n, R, M]`, 0 at padding: the critic's values at the rollout and what they are fitted
        to; None without a critic.
    """

    tokens: np.ndarray
    low: np.ndarray
    high: np.ndarray
    positions: np.ndarray
    image_slots: np.ndarray
    source: np.ndarray
    target: np.ndarray
    mask: np.ndarray
    completion: np.ndarray
    advantages: np.ndarray
    old_log_probs: np.ndarray
    sampler_log_probs: np.ndarray
    reference_log_probs: np.ndarray
    vision: VisionBatch | None
    micro_batches: np.ndarray
    tokens_total: np.ndarray
    completions_total: np.ndarray
    kl_coefficient: np.ndarray
    values: np.ndarray | None = None
    returns: np.ndarray | None = None


for _class in (VisionBatch, PackedBatch):
    jax.tree_util.register_dataclass(_class, data_fields=[f.name for f in dataclasses.fields(_class)], meta_fields=[])
