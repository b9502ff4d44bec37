"""The parts of a run, opened together and closed in reverse."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from lmmr1_jax.algorithms import registry
from lmmr1_jax.config.schema import TrainConfig
from lmmr1_jax.data.held_out import HeldOut
from lmmr1_jax.data.prompt_loader import PromptLoader
from lmmr1_jax.data.skips import SkipLog
from lmmr1_jax.learner.checkpoint import Checkpoints, whole_steps
from lmmr1_jax.learner.state import TrainState
from lmmr1_jax.rewards.rules.service import Verifier
from lmmr1_jax.rewards.sources.base import Rewards
from lmmr1_jax.rewards.sources.specs import check_rewards
from lmmr1_jax.rollout.evaluation import evaluate
from lmmr1_jax.rollout.local.sampler import sampling_key
from lmmr1_jax.rollout.rollout_queue import RolloutQueue
from lmmr1_jax.rollout.sampler import SamplingSettings
from lmmr1_jax.run import setup
from lmmr1_jax.run.folder import describe_run, open_run_folder
from lmmr1_jax.run.gap_monitor import LogProbGapMonitor
from lmmr1_jax.run.gap_probe import GapProbe
from lmmr1_jax.run.policy import PolicyModel, open_policy
from lmmr1_jax.run.snapshot import Snapshot, Stateful, take_snapshot
from lmmr1_jax.run.step import Step
from lmmr1_jax.runtime.device_memory import release_memory
from lmmr1_jax.runtime.stop_signal import StopSignal
from lmmr1_jax.tracking.console import ProgressDisplay
from lmmr1_jax.tracking.stopwatch import Stopwatch
from lmmr1_jax.tracking.tracker import Tracker
from lmmr1_jax.types.records import Rollout


@dataclasses.dataclass
class Run:
    """What the loop works with.

    Attributes:
      config: resolved, the algorithm's own values filled in.
      total_steps: of the whole run, those before a resumption included.
      resumed_at: the step that this process goes on from; 0 at the start.
      stop: tells of signals.
      policy: the model with its sampler.
      loader: encoded prompts in the run's order.
      rollouts: batches of groups in the learner's order.
      rewards: all sources of rewards.
      verifier: the rules, by which held-out prompts are judged.
      held_out: the prompts that are never trained on.
      step: the phases of a step.
      gap: watches the gap between the learner's and the sampler's log-probs.
      probe: measures that gap under the new weights; None where every step's own gap is on the policy.
      stateful: the parts that remember something between steps, by name.
      skips: rows that were skipped, with their reasons.
      checkpoints: those of the run's folder.
      display: the console.
      tracker: the run's files.
      skipped_updates: updates left out so far for gradients that were not finite.
    """

    config: TrainConfig
    total_steps: int
    resumed_at: int
    stop: StopSignal
    policy: PolicyModel
    loader: PromptLoader
    rollouts: RolloutQueue
    rewards: Rewards
    verifier: Verifier
    held_out: HeldOut
    step: Step
    gap: LogProbGapMonitor
    probe: GapProbe | None
    stateful: Mapping[str, Stateful]
    skips: SkipLog
    checkpoints: Checkpoints
    display: ProgressDisplay
    tracker: Tracker
    skipped_updates: int

    def snapshot(self, step: int, state: TrainState) -> Snapshot:
        """Where the run stands with this state behind `step` steps: every part is asked anew."""
        return take_snapshot(step, state, self.stateful)

    def evaluate(self, step: int) -> float | None:
        """Greedy accuracy on the held-out prompts by the sampler's present weights, which is written down; None where
        there are no such prompts."""
        if not self.held_out.prompts:
            return None
        clock = Stopwatch(self.display.phase)
        with clock("evaluate"):
            result = evaluate(
                self.policy.sampler,
                self.policy.processor.decode,
                self.verifier,
                self.held_out.encoded(),
                SamplingSettings(
                    max_new_tokens=self.config.eval.max_new_tokens or self.config.rollout.max_new_tokens,
                    temperature=0.0,
                    key=sampling_key(self.config.run.seed, step),
                ),
                check=self.stop.check,
                progress=self.display.progress,
                total=len(self.held_out.prompts),
            )
        if not result.prompts:
            self.tracker.warn("no held-out prompt can be used, so there is no evaluation; skipped.jsonl says why")
            return None
        self.tracker.evaluation(step, result.summary() | {"seconds": clock.total})
        return result.accuracy

    def log(self, step: int, groups: Sequence[Rollout], metrics: Mapping[str, float], clock: Stopwatch) -> None:
        """Writes a finished step down, and says what went wrong in it."""
        if step == self.resumed_at + 1:  # all programs are compiled
            release_memory()
        tokens = sum(len(completion.token_ids) for group in groups for completion in group.completions)
        figures = {f"time/{phase}": seconds for phase, seconds in clock.seconds.items()} | {
            "tokens_per_second": tokens / clock.total,
            "skipped": self.skips.total,
            "animated": self.loader.animated,
        }
        self.tracker.log(step, {**metrics, **figures}, groups)
        if (left_out := int(metrics["skipped_updates"]) - self.skipped_updates) > 0:
            self.tracker.warn(f"step {step}: updates left out for gradients not finite: {left_out}")
            self.skipped_updates += left_out
        for warning in self.rewards.warnings():
            self.tracker.warn(warning)

    def watch_gap(self, step: int, metrics: Mapping[str, float]) -> None:
        """Warns of a gap that is too large.

        Raises:
          UserError: it has been far too large for several steps in a row.
        """
        if warning := self.gap.observe(step, metrics["gap/mean"]):
            self.tracker.warn(warning)


@contextlib.contextmanager
def open_run(config: TrainConfig, stop: StopSignal) -> Iterator[tuple[Run, Snapshot]]:
    """Everything that a run needs, and where it stands: at its newest checkpoint, or at its start.

    Raises:
      UserError: the config, the folder, the model or the data can't be used.
      StopRequested: a signal came meanwhile.
    """
    config = registry.checked(config)
    check_rewards(config.rewards)
    stop.check()
    with contextlib.ExitStack() as parts:
        folder = parts.enter_context(open_run_folder(config))
        written = whole_steps(folder / "checkpoints")
        resumes = config.run.resume and bool(written)
        verifier = parts.enter_context(Verifier(config.rewards))
        skips = parts.enter_context(contextlib.closing(SkipLog(folder / "skipped.jsonl", keep=resumes)))
        policy = parts.enter_context(open_policy(config, resumed_at=max(written, default=0), check=stop.check))
        rewards = parts.enter_context(setup.build_rewards(config, policy, verifier, stop.check))
        stop.check()
        prompts, held_out_prompts = setup.read_data(config, policy.processor, verifier, skips)
        setup.try_rewards(rewards, prompts, policy.processor, config.rollout.completions)
        stop.check()
        loader = setup.build_prompt_loader(config, prompts, policy.processor, skips)
        parts.callback(loader.close)
        total_steps = setup.count_steps(config, len(prompts))
        learner = setup.build_learner(config, policy, total_steps * registry.updates_per_rollout(config))
        checkpoints = Checkpoints(folder / "checkpoints", keep=config.checkpoint.keep)
        parts.callback(checkpoints.close)
        display = parts.enter_context(ProgressDisplay(total_steps))
        step = Step(config, policy, learner, rewards.score, progress=display.progress)
        rollouts = RolloutQueue(
            loader,
            skips,
            step.begin,
            prompts=config.rollout.prompts,
            staleness=config.rollout.staleness,
            batches=total_steps,
        )
        held_out = HeldOut(held_out_prompts, policy.processor, skips, workers=config.data.workers)
        gap = LogProbGapMonitor(config.rollout.gap_warn, config.rollout.gap_stop)
        stateful = {"rollouts": rollouts, "held_out": held_out, "step": step, "gap": gap, "rewards": rewards}
        if resumes:
            at = Snapshot(*checkpoints.restore_newest(learner.abstract_state()))
            for name, part in stateful.items():
                part.load_state_dict(at.host[name])
        else:
            at = take_snapshot(0, setup.initial_state(config, policy, learner), stateful)
        describe_run(folder, config, policy.source)
        resume_step = at.step if resumes else None
        tracker = parts.enter_context(
            Tracker(folder, config, resume_step, total_steps, decode=policy.processor.decode, display=display)
        )
        for line in setup.introduction(config, policy, len(prompts), len(held_out_prompts), total_steps):
            tracker.say(line)
        yield (
            Run(
                config=config,
                total_steps=total_steps,
                resumed_at=at.step,
                stop=stop,
                policy=policy,
                loader=loader,
                rollouts=rollouts,
                rewards=rewards,
                verifier=verifier,
                held_out=held_out,
                step=step,
                gap=gap,
                # On the policy every step measures the gap itself.
                probe=GapProbe(config, policy, learner) if config.rollout.staleness else None,
                stateful=stateful,
                skips=skips,
                checkpoints=checkpoints,
                display=display,
                tracker=tracker,
                skipped_updates=int(at.state.skipped_updates),
            ),
            at,
        )
