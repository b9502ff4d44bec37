"""A run, from top to bottom.

Prompts are sampled from, the completions are scored, the scores become advantages, and the learner makes what was
better more likely; then the sampler gets the new weights and the next step begins. A run can be stopped, killed and
resumed between any two lines: where it stands is one value, the `Snapshot`, which is replaced and never changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lmmr1_jax.config.schema import TrainConfig
from lmmr1_jax.learner.state import TrainState
from lmmr1_jax.rewards.sources.base import RewardFailed
from lmmr1_jax.run.run import Run, open_run
from lmmr1_jax.run.snapshot import Snapshot
from lmmr1_jax.runtime.errors import SamplingFailed
from lmmr1_jax.runtime.stop_signal import StopRequested, StopSignal
from lmmr1_jax.tracking.rollout_metrics import off_policy_steps
from lmmr1_jax.tracking.stopwatch import Stopwatch
from lmmr1_jax.types.batches import PackedBatch
from lmmr1_jax.types.records import Rollout

INTERRUPTIONS = (StopRequested, SamplingFailed, RewardFailed)
"""What ends a run resumably: a signal, no engine left, a source of rewards that failed."""

Metrics = Mapping[str, float]


def train(config: TrainConfig, stop: StopSignal) -> dict[str, Any]:
    """Runs `config` to its end and returns what `summary.json` holds.

    Raises:
      UserError: the config, the model or the data can't be used, or the sampler and the learner have come apart.
      SamplingFailed: no engine is left, or none can sample from a prompt; a checkpoint has been written.
      RewardFailed: a source of rewards failed and `rewards.on_error` is "stop"; a checkpoint has been written.
      StopRequested: SIGTERM or Ctrl-C came; a checkpoint has been written, and `--resume` goes on from it. Where
        nothing had been done yet, there is neither a checkpoint nor a folder.
    """
    with open_run(config, stop) as (run, at):
        run.policy.sampler.load(at.state.params, at.step)
        try:
            # Also by a run that was killed before its first checkpoint: evaluating can widen the sampler's shapes, and
            # with them change the last bits of what it samples.
            at, _ = evaluate_if_due(run, at)
            while at.step < run.total_steps:
                clock = Stopwatch(run.display.phase)
                groups, batches, collected = collect(run, at, clock)  # interrupted here, `at` is still true
                state, learned = learn(run, at.state, batches, clock)  # donates at.state, and is never interrupted
                done, metrics = at.step + 1, {**collected, **learned, **off_policy_steps(groups, at.step)}
                metrics, interruption = hand_over(run, done, state, groups, metrics, clock)
                run.log(done, groups, metrics, clock)
                if interruption is None:
                    run.watch_gap(done, metrics)
                at = run.snapshot(done, state)
                if interruption is not None:  # the step is done all the same, and has been written down
                    raise interruption
                at, accuracy = evaluate_if_due(run, at)
                if accuracy is not None or at.step == run.total_steps or at.step % config.checkpoint.every == 0:
                    run.checkpoints.save(at.step, at.state, at.host, score=accuracy)
        except INTERRUPTIONS as reason:
            run.checkpoints.save_once(at.step, at.state, at.host)
            run.tracker.say(f"stopped by {reason} after step {at.step}; --resume goes on from there")
            raise
        run.checkpoints.wait()
        return run.tracker.finish(skipped=run.skips.counts)


def collect(run: Run, at: Snapshot, clock: Stopwatch) -> tuple[list[Rollout], list[PackedBatch], Metrics]:
    """Samples, scores and packs a step's groups: the groups, the minibatches with their advantages, and metrics."""
    run.stop.check()
    with clock("rollout"):
        groups = run.rollouts.next(at.step)
    run.stop.check()
    with clock("score"):
        groups = run.step.score(groups)
    groups, dynamic = run.step.replace_equal(groups, run.loader.take, at.step, clock)
    run.policy.sampler.sleep()
    with clock("score"):
        batches, prepared = run.step.prepare(groups, at.state)
    run.stop.check()
    return groups, batches, {**dynamic, **prepared}


def learn(
    run: Run, state: TrainState, batches: Sequence[PackedBatch], clock: Stopwatch
) -> tuple[TrainState, dict[str, float]]:
    """All updates of a step; `state` is gone afterwards."""
    with clock("learn"):
        return run.step.update(state, batches)


def hand_over(
    run: Run, done: int, state: TrainState, groups: Sequence[Rollout], metrics: Metrics, clock: Stopwatch
) -> tuple[Metrics, Exception | None]:
    """Gives the sampler the new weights.

    With staleness the step's own gap is of older weights, and the probe's takes its place.

    Returns:
      The step's metrics, and what interrupted the hand-over: the step counts all the same.
    """
    in_flight = run.config.rollout.weight_update == "in-flight"
    if run.probe is not None:
        metrics = {name: value for name, value in metrics.items() if not name.startswith("gap/")}
    with clock("sync"):
        try:
            run.policy.sampler.load(state.params, done, in_flight=in_flight)
            if run.probe is not None:
                metrics = {**metrics, **run.probe.measure(groups[0].encoded, state.params)}
        except (StopRequested, SamplingFailed) as reason:
            return metrics, reason
    return metrics, None


def evaluate_if_due(run: Run, at: Snapshot) -> tuple[Snapshot, float | None]:
    """Evaluates the policy before the first step, after the last, and every `eval.every`.

    Returns:
      Where the run stands afterwards, for evaluating can widen the sampler's shapes, and the accuracy; None where
      nothing was evaluated.
    """
    every = run.config.eval.every
    due = at.step in (0, run.total_steps) or bool(every and at.step % every == 0)
    if not due or at.step in run.tracker.evaluations:
        return at, None
    accuracy = run.evaluate(at.step)
    return run.snapshot(at.step, at.state), accuracy
