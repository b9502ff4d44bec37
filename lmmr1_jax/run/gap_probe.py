"""The gap between learner and engines at equal weights, for runs whose batches were sampled under older ones."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from lmmr1_jax.config.schema import TrainConfig
from lmmr1_jax.learner.learner import Learner
from lmmr1_jax.packing.pack import PackShapes, gather, grow, pack, plan_shapes
from lmmr1_jax.packing.shapes import TOKENS_PER_DEVICE
from lmmr1_jax.parallel.sharding import row_shards
from lmmr1_jax.rollout.sampler import ProbedSampler, SamplingSettings
from lmmr1_jax.run.policy import PolicyModel
from lmmr1_jax.types.records import EncodedPrompt, Rollout

COMPLETIONS = 2
MOST_TOKENS = 64


class GapProbe:
    """After a sync, one fixed prompt is sampled from by every engine and scored by the learner, both with the new
    weights.

    It is sampled anew and not merely scored: vLLM's log-probs of given tokens leave temperature and banned tokens out,
    and would not be the policy's.
    """

    def __init__(self, config: TrainConfig, policy: PolicyModel, learner: Learner):
        self._config, self._policy, self._learner = config, policy, learner
        self._prompt: EncodedPrompt | None = None
        self._shapes: PackShapes | None = None

    def measure(self, prompt: EncodedPrompt, params: dict[str, Any]) -> dict[str, float]:
        """The metrics `gap/mean` and `gap/max`, over the tokens of all engines.

        Args:
          prompt: any of the run; the first one is kept.
          params: the weights that the engines were just given.
        """
        self._prompt = self._prompt or prompt
        sampler: ProbedSampler = self._policy.sampler
        rollout = self._config.rollout
        settings = SamplingSettings(min(MOST_TOKENS, rollout.max_new_tokens), rollout.temperature)
        groups = sampler.probe(self._prompt, COMPLETIONS, settings)
        rollouts = [Rollout(self._prompt, group) for group in groups]
        batch = pack(rollouts, self._fit(rollouts), self._policy.network.config.vision, self._policy.processor.patches)
        scored = gather(self._learner.log_probs(params, batch), batch, int(batch.completions_total))
        completions = [completion for group in groups for completion in group]
        gaps = np.concatenate([np.abs(own - c.log_probs) for own, c in zip(scored, completions, strict=True)])
        return {"gap/mean": float(gaps.mean()), "gap/max": float(gaps.max())}

    def _fit(self, rollouts: list[Rollout]) -> PackShapes:
        """One static shape, for as many engines as the run has."""
        vision = self._policy.network.config.vision
        if self._shapes is None:
            self._shapes = plan_shapes(
                rollouts,
                learner=self._config.learner,
                max_new_tokens=min(MOST_TOKENS, self._config.rollout.max_new_tokens),
                vision=vision,
                minibatch_groups=self._config.vllm.num_engines,
                row_devices=row_shards(self._policy.mesh),
                tokens_per_device=TOKENS_PER_DEVICE if jax.default_backend() != "cpu" else 1024,
            )
        self._shapes = grow(self._shapes, rollouts, vision)
        return self._shapes
