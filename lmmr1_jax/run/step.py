"""The phases of a step, each of which gives back what it made and what it measured.

    groups = step.begin(loader.take(P), number)()       # what the policy writes
    groups = step.score(groups)                         # what it earns
    batches, metrics = step.prepare(groups, state)      # advantages, and the passes they need
    state, metrics = step.update(state, batches)        # what it learns
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from lmmr1_jax.algorithms import losses, registry, value_loss
from lmmr1_jax.algorithms.kl import adapted_coefficient
from lmmr1_jax.algorithms.overlong import with_overlong_penalty
from lmmr1_jax.algorithms.ppo import critic_metrics
from lmmr1_jax.config.schema import TrainConfig
from lmmr1_jax.learner.learner import Learner
from lmmr1_jax.learner.state import TrainState
from lmmr1_jax.packing.pack import PackShapes, gather, grow, pack, plan_shapes, scatter
from lmmr1_jax.packing.shapes import tokens_per_device
from lmmr1_jax.parallel.sharding import row_shards
from lmmr1_jax.rollout.dynamic_sampling import replace_equal_groups
from lmmr1_jax.rollout.local.sampler import sampling_key
from lmmr1_jax.rollout.sampler import SamplingSettings
from lmmr1_jax.run.policy import PolicyModel
from lmmr1_jax.tracking.stopwatch import Stopwatch
from lmmr1_jax.types.batches import PackedBatch
from lmmr1_jax.types.records import EncodedPrompt, Rollout

_LAST = ("learning_rate", "skipped_updates", "value/learning_rate")
"""Metrics of which a step tells the last update's."""
_PER_TOKEN = {*losses.METRICS, *value_loss.METRICS} - {"loss/policy"}
"""Metrics that are means over an update's tokens; what the policy's loss is a mean of, its aggregation says."""

RewardFn = Callable[[Sequence[Rollout], Callable[[int, int], None]], list[Rollout]]
Metrics = dict[str, float]


class Step:
    """The phases over the parts that they need.

    Attributes:
      shapes: of the packed batches; planned at the first rollout, part of the run's state from then on, because
        padding can change the last bit of a sum.
      kl_coefficient: beta, part of the run's state too where the config steers it.
    """

    def __init__(
        self,
        config: TrainConfig,
        policy: PolicyModel,
        learner: Learner,
        rewards: RewardFn,
        *,
        progress: Callable[[int, int], None] = lambda done, total: None,
        forced_length: bool = False,
    ):
        """
        Args:
          config: the run's.
          policy: the model with its sampler.
          learner: the model's learner.
          rewards: gives rollouts their rewards; `Rewards.score`.
          progress: called with how much of a phase is done, of how much.
          forced_length: completions don't end before the limit (for benchmarks).
        """
        self.config, self.policy, self.learner = registry.resolved(config), policy, learner
        self.kl_coefficient = config.algorithm.kl_coefficient
        self.shapes: PackShapes | None = None
        self._rewards, self._progress = rewards, progress
        self._forced_length = forced_length
        self._algorithm = registry.algorithm(config.algorithm)
        self._reference = _in_compute_dtype(policy) if registry.needs_reference(config) else None

    def begin(self, prompts: Sequence[EncodedPrompt], done: int, again: int = 0) -> Callable[[], list[Rollout]]:
        """Lets the sampler begin with `prompts`, for the step that `done` steps lie behind; what it returns waits for
        the groups. `again` counts the step's further batches: a prompt that comes twice is not sampled alike."""
        rollout, sampler = self.config.rollout, self.policy.sampler
        key = sampling_key(self.config.run.seed, done)
        settings = SamplingSettings(
            max_new_tokens=rollout.max_new_tokens,
            temperature=rollout.temperature,
            ignore_ends=self._forced_length,
            key=jax.random.fold_in(key, again) if again else key,
        )
        handle = sampler.submit(prompts, rollout.completions, settings)

        def collect() -> list[Rollout]:
            return [Rollout(*pair) for pair in zip(prompts, sampler.collect(handle, self._progress), strict=True)]

        return collect

    def score(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """The same groups with their rewards."""
        scored = self._rewards(rollouts, self._progress)
        return with_overlong_penalty(scored, self.config.algorithm, self.config.rollout.max_new_tokens)

    def replace_equal(
        self, rollouts: Sequence[Rollout], take: Callable[[int], list[EncodedPrompt]], done: int, clock: Stopwatch
    ) -> tuple[list[Rollout], Metrics]:
        """DAPO's dynamic sampling: groups that earned all the same give way to those of fresh prompts, which `take`
        gives (`rollout.dynamic_sampling`). What was sampled once more is timed as `rollout` and `score`."""

        def more(again: int) -> list[Rollout]:
            with clock("rollout"):
                fresh = self.begin(take(len(rollouts)), done, again)()
            with clock("score"):
                return self.score(fresh)

        rounds = self.config.algorithm.dynamic_sampling_rounds
        return replace_equal_groups(rollouts, more, rounds) if rounds else (list(rollouts), {})

    def prepare(self, rollouts: Sequence[Rollout], state: TrainState) -> tuple[list[PackedBatch], Metrics]:
        """The groups as minibatches, with advantages, and the log-probs and values that the algorithm asks for.

        Old and reference log-probs and a critic's values cost a pass each and are computed only where something reads
        them. Metrics are the critic's, where there is one.
        """
        metrics: Metrics = {}
        algorithm = dataclasses.replace(self.config.algorithm, kl_coefficient=self.kl_coefficient)
        minibatches = [list(part) for part in _deal(rollouts, self.config.learner.minibatches)]
        self._fit_shapes(rollouts, minibatches)
        vision, patches_of = self.policy.network.config.vision, self.policy.processor.patches
        batches = [pack(groups, self.shapes, vision, patches_of) for groups in minibatches]
        if registry.needs_old(self.config):
            batches = [
                dataclasses.replace(batch, old_log_probs=self.learner.log_probs(state.params, batch))
                for batch in batches
            ]
        log_ratios = None
        if self._reference is not None:
            batches = [
                dataclasses.replace(batch, reference_log_probs=self.learner.log_probs(self._reference, batch))
                for batch in batches
            ]
        if self._reference is not None and algorithm.kl_placement == "reward":
            log_ratios = _gathered([batch.old_log_probs - batch.reference_log_probs for batch in batches], batches)
        # All groups of the step together: an algorithm may normalise over the whole rollout batch.
        if self._algorithm.critic:
            batches = [dataclasses.replace(batch, values=self.learner.values(state, batch)) for batch in batches]
            values = _gathered([batch.values for batch in batches], batches)
            rollouts, returns = self._algorithm.advantages(rollouts, algorithm, log_ratios, values)
            metrics = critic_metrics(values, returns)
            left = iter(returns)
            batches = [
                dataclasses.replace(batch, returns=scatter([next(left) for _ in range(_completions(batch))], batch))
                for batch in batches
            ]
        else:
            rollouts = self._algorithm.advantages(rollouts, algorithm, log_ratios)
        with_advantages = iter(rollouts)
        batches = [
            dataclasses.replace(
                batch,
                advantages=scatter([a for _ in groups for a in next(with_advantages).advantages], batch),
                kl_coefficient=np.asarray(self.kl_coefficient, np.float32),
            )
            for groups, batch in zip(minibatches, batches, strict=True)
        ]
        return batches, metrics

    def update(self, state: TrainState, batches: Sequence[PackedBatch]) -> tuple[TrainState, Metrics]:
        """All updates of the step. Metrics are means over the tokens of all updates, or over the updates where an
        update has one number; but for the gap (the first update's, whose weights are those that sampled) and for what
        counts on (the last's)."""
        self.policy.sampler.release_params()
        micro_batches = [int(batch.micro_batches) for batch in batches] * self.config.learner.epochs
        updates, tokens = [], []
        for number, batch in enumerate([*batches] * self.config.learner.epochs):
            state, metrics = self.learner.update(state, batch)
            updates.append(metrics)
            tokens.append(float(batch.tokens_total))
            self._progress(sum(micro_batches[: number + 1]), sum(micro_batches))
        combined = {
            name: float(np.average([m[name] for m in updates], weights=tokens if name in _PER_TOKEN else None))
            for name in updates[0]
        }
        combined |= {name: updates[0][name] for name in ("gap/mean", "gap/max")}
        combined |= {name: updates[-1][name] for name in _LAST if name in updates[-1]}
        if self._reference is None:
            combined.pop("kl", None)  # nothing was measured
            return state, combined
        combined["kl_coefficient"] = self.kl_coefficient
        if (algorithm := self.config.algorithm).kl_target:
            self.kl_coefficient = adapted_coefficient(
                self.kl_coefficient,
                combined["kl"],
                target=algorithm.kl_target,
                horizon=algorithm.kl_horizon,
                completions=int(sum(batch.completions_total for batch in batches)),
            )
        return state, combined

    def state_dict(self) -> dict[str, Any]:
        """Shapes, the learner's and the sampler's, and the KL's coefficient: what a resumed run must go on with."""
        packed = None if self.shapes is None else dataclasses.asdict(self.shapes)
        return {"packed": packed, "sampler": self.policy.sampler.state_dict(), "kl_coefficient": self.kl_coefficient}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Back to `state`; on another number of devices rows are planned anew."""
        packed = state["packed"]
        if packed is not None and packed["row_devices"] == row_shards(self.policy.mesh):
            self.shapes = PackShapes(**packed)
        self.policy.sampler.load_state_dict(state["sampler"])
        if self.config.algorithm.kl_target:
            self.kl_coefficient = state["kl_coefficient"]

    def _fit_shapes(self, rollouts: Sequence[Rollout], minibatches: Sequence[Sequence[Rollout]]) -> None:
        vision = self.policy.network.config.vision
        if self.shapes is None:
            self.shapes = plan_shapes(
                rollouts,
                learner=self.config.learner,
                max_new_tokens=self.config.rollout.max_new_tokens,
                vision=vision,
                minibatch_groups=max(len(groups) for groups in minibatches),
                row_devices=row_shards(self.policy.mesh),
                tokens_per_device=tokens_per_device(),
            )
        for groups in minibatches:
            self.shapes = grow(self.shapes, groups, vision)


def _deal(rollouts: Sequence[Rollout], minibatches: int) -> Iterator[Sequence[Rollout]]:
    """Whole groups in order, in parts whose sizes differ by one at most."""
    bounds = np.linspace(0, len(rollouts), minibatches + 1).round().astype(int)
    return (rollouts[start:stop] for start, stop in zip(bounds[:-1], bounds[1:], strict=True))


def _gathered(values: Sequence[np.ndarray], batches: Sequence[PackedBatch]) -> list[np.ndarray]:
    """Values in the response slots of minibatches, back to all their completions, one minibatch after the other."""
    pairs = zip(values, batches, strict=True)
    return [row for value, batch in pairs for row in gather(value, batch, _completions(batch))]


def _completions(batch: PackedBatch) -> int:
    return int(batch.completions_total)


def _in_compute_dtype(policy: PolicyModel) -> dict[str, Any]:
    """The starting policy again, to measure the KL against; half the size where products are bfloat16."""
    dtype = policy.network.compute_dtype
    return jax.tree.map(lambda leaf: leaf.astype(dtype), policy.load())
