"""The shapes that travel: every value that one room of the project hands to another.

    prompt set -> Prompt -> processor -> EncodedPrompt -> sampler -> Completion -> rewards -> Reward
               -> Rollout -> advantages -> packing -> PackedBatch -> learner

All arrays here are NumPy arrays on the host, and nothing here imports JAX: reward servers and engines know these types
too. `PackedBatch`, which does, is in `batches.py`.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a reward server knows these types and computes nothing
    import numpy as np

FINISH_STOP, FINISH_LENGTH, FINISH_ABORT = "stop", "length", "abort"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A row of the prompt set that has been read and found whole; its images have not been opened yet.

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
class Image:
    """An image at its final size. Pixels are kept, not patches: they take an eighth of the memory.

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
      token_ids: int32 `[P]`, every image expanded to its number of image tokens.
      positions: int32 `[3, P]`, temporal, height and width positions (three equal rows for text).
      images: the prompt's images in order of appearance.
      image_slots: int32 `[S]`, indices into `token_ids` that the merged patches of `images` fill, in order.
      next_position: the position, equal in all three rows, of the first completion token.
    """

    prompt: Prompt
    token_ids: np.ndarray
    positions: np.ndarray
    images: tuple[Image, ...]
    image_slots: np.ndarray
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
class Reward:
    """A completion's reward.

    Attributes:
      total: the number that the algorithm sees.
      parts: named parts, each before its weight, e.g. {"accuracy": 1.0, "format": 0.0}.
      fault: why a judge could not judge it ("timeout", "died", "error"), None when all could; `total` is 0 then.
    """

    total: float
    parts: dict[str, float]
    fault: str | None = None


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
