"""The shapes that travel: every value that one room of the project hands to another.

    prompt set -> Prompt -> processor -> EncodedPrompt -> sampler -> Completion -> rewards -> Reward
               -> Rollout -> advantages -> packing -> PackedBatch -> learner

All arrays here are NumPy arrays on the host. `PackedBatch` and `VisionBatch` are JAX pytrees as well, so the same
value goes straight into a jitted function.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from lmmr1_jax.rewards.reward import Reward

FINISH_STOP, FINISH_LENGTH, FINISH_ABORT = "stop", "length", "abort"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A row of the prompt set that has been read and found whole; its pictures have not been opened yet.

    Attributes:
      messages: OpenAI-style messages, `content` either a string or a list of `{"type": "text" | "image", ...}`.
      label: the gold answer as the file has it; None where the command needs none.
      prompt_id: unique within the prompt set; groups are named by it.
      data_source: where the row says it comes from, else the file's stem.
      file: the file that the row was read from.
      row: the row's number in that file, from 0.
      verifier: the name of the verifier that judges its completions; empty where nobody has chosen yet.
    """

    messages: list[dict[str, Any]]
    label: str | None
    prompt_id: str
    data_source: str
    file: str
    row: int
    verifier: str = ""


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture at its final size. Pixels are kept, not patches: they take an eighth of the memory.

    Attributes:
      pixels: uint8 `[height, width, 3]`, RGB, both sides multiples of patch_size * spatial_merge_size.
      grid_thw: patches in time, height and width.
      animated: whether the file held more frames than the first, which is all that is used.
    """

    pixels: np.ndarray
    grid_thw: tuple[int, int, int]
    animated: bool = False


@dataclasses.dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the models see it. Made once, by the processor, and used by samplers and learner alike.

    Attributes:
      prompt: where it comes from.
      token_ids: int32 `[P]`, every picture expanded to its number of picture tokens.
      positions: int32 `[3, P]`, temporal, height and width positions (three equal rows for text).
      pictures: the prompt's pictures in order of appearance.
      picture_slots: int32 `[S]`, indices into `token_ids` that the merged patches of `pictures` fill, in order.
      next_position: the position, equal in all three rows, of the first completion token.
    """

    prompt: Prompt
    token_ids: np.ndarray
    positions: np.ndarray
    pictures: tuple[Picture, ...]
    picture_slots: np.ndarray
    next_position: int


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a sampler wrote for a prompt.

    Attributes:
      token_ids: int32 `[R]`; ends with the end token exactly when `finish_reason` is "stop".
      log_probs: float32 `[R]`, policy log-probs (temperature and banned tokens included) by the sampler.
      finish_reason: "stop", "length" or "abort".
      policy_version: int32 `[R]`, how many updates the weights had seen that sampled the token.
    """

    token_ids: np.ndarray
    log_probs: np.ndarray
    finish_reason: str
    policy_version: np.ndarray


@dataclasses.dataclass(frozen=True)
class Rollout:
    """A group: a prompt and all that was sampled from it. Membership is this object, never an order of rows.

    Attributes:
      encoded: the prompt.
      completions: the group's completions.
      rewards: one per completion.
      advantages: float32 `[R]` per completion, one number per token; empty until the algorithm has run.
    """

    encoded: EncodedPrompt
    completions: tuple[Completion, ...]
    rewards: tuple[Reward, ...] = ()
    advantages: tuple[np.ndarray, ...] = ()


@dataclasses.dataclass(frozen=True)
class VisionBatch:
    """Patches of many pictures in rows of fixed length, with all their geometry as data.

    A row holds whole pictures one after the other and is attended to on its own. Where the tower has windows,
    patches stand window by window and each window is padded to its full number of patches (64 for Qwen2.5-VL);
    a padding slot has segment 0. Four neighbouring slots merge into one token.

    Attributes:
      patches: float32 `[..., rows, slots, patch_values]` (1176 values for 14x14 patches of two RGB frames).
      coordinates: int32 `[..., rows, slots, 2]`, the patch's row and column in its picture, for the rotary embedding.
      segment_ids: int32 `[..., rows, slots]`; frames are numbered from 1 within a row, 0 is padding.
    """

    patches: np.ndarray
    coordinates: np.ndarray
    segment_ids: np.ndarray


@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """A minibatch as the learner takes it: micro-batches of rows of fixed length, padded to a fixed number.

    In a row a group's prompt stands once and its completions follow. A query may see an earlier key of the row when
    both have the same segment, or when the key's segment is the query's prefix. What is predicted lives in
    response slots: slot m of a row predicts `target[m]` from the hidden state at `source[m]`; the first token of
    every completion is predicted from the prompt's last token.

    n = micro-batches, R = rows, L = row length, M = response slots of a row.

    Attributes:
      tokens: int32 `[n, R, L]`.
      segment_ids: int32 `[n, R, L]`, from 1 within a row, 0 is padding.
      prefix_ids: int32 `[n, R, L]`, the segment of the token's prompt; a prompt token's own segment.
      positions: int32 `[n, 3, R, L]`.
      picture_slots: int32 `[n, R, L]`, index of the merged picture token (over the micro-batch's vision rows,
        flattened) that stands here, -1 where text stands.
      source: int32 `[n, R, M]`.
      target: int32 `[n, R, M]`.
      mask: float32 `[n, R, M]`, 1 where a slot holds a completion token.
      completion: int32 `[n, R, M]`, number of the completion within the minibatch, -1 for padding.
      advantages, old_log_probs, sampler_log_probs, reference_log_probs: float32 `[n, R, M]`, 0 at padding.
      vision: `[n, ...]` vision rows, or None for a batch without pictures.
      micro_batches: int32 `[]`, how many of the n hold anything.
      tokens_total: float32 `[]`, completion tokens in the whole minibatch.
      completions_total: float32 `[]`, completions in the whole minibatch.
      kl_coefficient: float32 `[]`, of the KL in the loss; 0 until the step has set it.
      values, returns: float32 `[n, R, M]`, 0 at padding: the critic's values at the rollout and what they are fitted
        to; None without a critic.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray
    prefix_ids: np.ndarray
    positions: np.ndarray
    picture_slots: np.ndarray
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
