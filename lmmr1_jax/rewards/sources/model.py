"""Reward models as sources of rewards, and what makes one fit a policy: its tokenizer above all.

A reward model reads the very token ids that the policy saw and sampled. So its tokenizer must give every id the same
meaning, and its images must be cut into as many tokens; both are checked before anything is sampled.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from lmmr1_jax.config.schema import LearnerConfig
from lmmr1_jax.data.compatibility import check_fit
from lmmr1_jax.data.processor import Processor
from lmmr1_jax.rewards.sources.base import Group, Scored, nobody
from lmmr1_jax.rewards.sources.reward_model import RewardModel
from lmmr1_jax.rewards.sources.specs import ModelSpec
from lmmr1_jax.rewards.workers.pool import WorkerFailure
from lmmr1_jax.runtime.errors import UserError
from lmmr1_jax.types.records import Reward
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
        if group.rollout.encoded.images and self.model.config.vision is None:
            _log.warning("rewards.models: %s is a model of text: it does not see the images", self._folder)

    def score(self, groups: Sequence[Group], scored: Scored = nobody) -> list[list[Reward | WorkerFailure]]:
        """`sources.RewardSource.score`. A score that is not finite is a fault, and so is a token that the model has
        no embedding for: tables are padded beyond the tokenizer's last token, and not all to the same size."""
        rollouts = [group.rollout for group in groups]
        return [
            [
                self._result(score, completion.token_ids)
                for score, completion in zip(scores, rollout.completions, strict=True)
            ]
            for scores, rollout in zip(self.model.score(rollouts), rollouts, strict=True)
        ]

    def close(self) -> None:
        """Nothing: the weights go with the model."""

    def state_dict(self) -> dict[str, Any] | None:
        """What a resumed run must go on with."""
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Goes back to `state`."""
        self.model.load_state_dict(state)

    def _result(self, score: float, token_ids: np.ndarray) -> Reward | WorkerFailure:
        largest = int(np.max(token_ids, initial=0))
        if largest >= self.model.config.text.vocab_size:
            return WorkerFailure("error", f"{self._folder} has no embedding for the sampled token {largest}")
        if not math.isfinite(score):
            return WorkerFailure("error", f"{self._folder} gave the score {score}")
        return Reward(self._weight * score, {self.name: score})


def open_model(
    spec: ModelSpec,
    policy: Processor,
    mesh: Mesh,
    *,
    compute_dtype: Any,
    learner: LearnerConfig,
    max_new_tokens: int,
    attention: str = "xla",
) -> RewardModelSource:
    """The reward model of an entry of `rewards.models`; the arguments as `RewardModel` takes them.

    Raises:
      UserError: it does not fit the policy, or its folder can't be read.
    """
    try:
        image_format = check_fit(spec.folder, policy)
    except (UserError, CheckpointError) as error:
        raise UserError(f"rewards.models: {error}") from None
    try:
        model = RewardModel(
            spec.folder,
            mesh,
            compute_dtype=compute_dtype,
            image_format=image_format,
            learner=learner,
            max_new_tokens=max_new_tokens,
            attention=attention,
        )
    except CheckpointError as error:
        raise UserError(
            f"rewards.models: {error}; a reward model is its base model's checkpoint and score.weight [1, hidden]"
        ) from None
    return RewardModelSource(spec, model)


