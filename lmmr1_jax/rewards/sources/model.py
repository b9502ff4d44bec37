"""Reward models as sources of rewards, and what makes one fit a policy: its tokenizer above all.

A reward model reads the very token ids that the policy saw and sampled. So its tokenizer must give every id the same
meaning, and its pictures must be cut into as many tokens; both are checked before anything is sampled.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from lmmr1_jax.config.schema import LearnerConfig
from lmmr1_jax.data.pictures import PictureFormat
from lmmr1_jax.data.processor import Processor, read_picture_format, read_tokenizer
from lmmr1_jax.runtime.errors import UserError
from lmmr1_jax.models.config import ModelConfig, read_config
from lmmr1_jax.rewards.workers.pool import Fault
from lmmr1_jax.rewards.reward import Reward
from lmmr1_jax.rewards.sources.reward_model import RewardModel
from lmmr1_jax.rewards.sources.base import Group
from lmmr1_jax.rewards.sources.specs import ModelSpec
from weights_bridge.errors import CheckpointError

_log = logging.getLogger(__name__)


class RewardModelSource:
    """A reward model with one part, its score.

    Attributes:
      name: of the part.
      model: the reward model.
    """

    def __init__(self, spec: ModelSpec, model: RewardModel):
        self.name, self.model = spec.name, model
        self._weight, self._folder = spec.weight, spec.folder

    def check(self, group: Group) -> None:
        """`sources.RewardSource.check`: computes nothing, for all that could be wrong was seen on opening."""
        if group.rollout.encoded.pictures and self.model.config.vision is None:
            _log.warning("rewards.models: %s is a model of text: it does not see the pictures", self._folder)

    def judge(self, groups: Sequence[Group]) -> list[list[Reward | Fault]]:
        """`sources.RewardSource.judge`. A score that is not finite is a fault, and so is a token that the model has
        no embedding for: tables are padded beyond the tokenizer's last token, and not all to the same size."""
        rollouts = [group.rollout for group in groups]
        return [
            [
                self._verdict(score, completion.token_ids)
                for score, completion in zip(scores, rollout.completions, strict=True)
            ]
            for scores, rollout in zip(self.model.score(rollouts), rollouts, strict=True)
        ]

    def close(self) -> None:
        """Nothing: the weights go with the model."""

    def state(self) -> dict[str, Any] | None:
        """What a resumed run must go on with."""
        return self.model.state()

    def restore(self, state: dict[str, Any] | None) -> None:
        """Back to `state`."""
        self.model.restore(state)

    def _verdict(self, score: float, token_ids: np.ndarray) -> Reward | Fault:
        largest = int(np.max(token_ids, initial=0))
        if largest >= self.model.config.text.vocab_size:
            return Fault("error", f"{self._folder} has no embedding for the sampled token {largest}")
        if not math.isfinite(score):
            return Fault("error", f"{self._folder} gave the score {score}")
        return Reward(self._weight * score, {self.name: score})


def open_model(
    spec: ModelSpec,
    policy: Processor,
    mesh: Mesh,
    *,
    compute_dtype: Any,
    learner: LearnerConfig,
    max_new_tokens: int,
) -> RewardModelSource:
    """The reward model of an entry of `rewards.models`; the arguments as `RewardModel` takes them.

    Raises:
      UserError: it does not fit the policy, or its folder can't be read.
    """
    try:
        picture_format = check_fit(spec.folder, policy)
        model = RewardModel(
            spec.folder,
            mesh,
            compute_dtype=compute_dtype,
            picture_format=picture_format,
            learner=learner,
            max_new_tokens=max_new_tokens,
        )
    except UserError as error:
        raise UserError(f"rewards.models: {error}") from None
    except CheckpointError as error:
        raise UserError(
            f"rewards.models: {error}; a reward model is its base model's checkpoint and score.weight [1, hidden]"
        ) from None
    return RewardModelSource(spec, model)


def check_fit(folder: str | Path, policy: Processor) -> PictureFormat | None:
    """How the reward model (or critic) in `folder` takes the policy's pictures; None where one of the two takes none.

    Raises:
      UserError: another tokenizer, too small a table, or pictures of other patches than the policy's.
    """
    folder = Path(folder)
    config = read_config(folder)
    vocabulary = read_tokenizer(folder).get_vocab()
    _check_vocabulary(folder, vocabulary, policy.tokenizer.get_vocab())
    size, last = config.text.vocab_size, max(vocabulary.values())
    if size <= last:
        raise UserError(f"{folder}: the model has {size} embeddings (vocab_size), its tokenizer tokens up to {last}")
    if config.vision is None or policy.config.vision is None:
        return None
    _check_pictures(folder, config, policy.config)
    return read_picture_format(folder, config, policy.format.min_pixels, policy.format.max_pixels)


def _check_vocabulary(folder: Path, own: Mapping[str, int], policys: Mapping[str, int]) -> None:
    if own == policys:
        return
    different = [token for token in {**policys, **own} if own.get(token) != policys.get(token)]
    example = min(different, key=lambda token: min(v.get(token, math.inf) for v in (own, policys)))
    here, there = (f"id {v[example]}" if example in v else "missing" for v in (own, policys))
    raise UserError(
        f"{folder}: its tokenizer is another than the policy's: {len(different)} tokens differ, {example!r} is {here} "
        f"there and {there} in the policy's; it must have been trained with the policy's tokenizer"
    )


def _check_pictures(folder: Path, config: ModelConfig, policy: ModelConfig) -> None:
    if config.image_token_id != policy.image_token_id:
        raise UserError(
            f"{folder}: image_token_id is {config.image_token_id}, the policy's is {policy.image_token_id}"
        )
    for field in ("patch_size", "temporal_patch_size", "spatial_merge_size"):
        own, wanted = getattr(config.vision, field), getattr(policy.vision, field)
        if own != wanted:
            raise UserError(f"{folder}: its {field} is {own}, the policy's is {wanted}; pictures would be other tokens")
