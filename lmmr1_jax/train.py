"""A run, from top to bottom.

    python -m lmmr1_jax.train --config configs/rloo.py

Prompts are sampled from, the completions are scored, the scores become advantages, and the learner makes what was
better more likely; then the sampler gets the new weights and the next step begins. The rest of this file is what
makes that loop one that can be followed, stopped, killed and resumed.

JAX is imported inside `train`, so that a mistyped flag is answered at once.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

from lmmr1_jax.config.command_line import parse_train_config
from lmmr1_jax.config.schema import TrainConfig
from lmmr1_jax.rollout.sampler_registry import check_sampler
from lmmr1_jax.runtime.cli import run_cli
from lmmr1_jax.runtime.device_memory import share_devices


def train(config: TrainConfig) -> dict[str, Any]:
    """Runs `config` to its end and returns what `summary.json` holds.

    Raises:
      UserError: the config, the model or the data can't be used, or the sampler and the learner have come apart.
      SamplingFailed: no vLLM engine is left, or none can sample from a prompt; a checkpoint has been written.
      RewardFailed: a source of rewards failed and `rewards.on_error` is "stop"; a checkpoint has been written.
      StopRequested: SIGTERM or Ctrl-C came; a checkpoint has been written, and `--resume` goes on from it. Where
        nothing had been done yet, there is neither a checkpoint nor a folder.
    """
    from lmmr1_jax.runtime.stop_signal import StopRequested, StopSignal

    check_sampler(config)
    with contextlib.ExitStack() as open_parts:
        stop = open_parts.enter_context(StopSignal())  # first: a Ctrl-C while JAX is imported is easily lost
        share_devices(config.vllm)
        from lmmr1_jax.algorithms import registry
        from lmmr1_jax.data.held_out import HeldOut
        from lmmr1_jax.data.skips import SkipLog
        from lmmr1_jax.learner.checkpoint import Checkpoints, whole_steps
        from lmmr1_jax.rewards.rules.service import Verifier
        from lmmr1_jax.rewards.sources.base import RewardFailed
        from lmmr1_jax.rewards.sources.specs import check_rewards
        from lmmr1_jax.rollout.evaluation import evaluate
        from lmmr1_jax.rollout.local.sampler import sampling_key
        from lmmr1_jax.rollout.rollout_queue import RolloutQueue
        from lmmr1_jax.rollout.sampler import SamplingSettings
        from lmmr1_jax.run import setup
        from lmmr1_jax.run.folder import describe_run, open_run_folder
        from lmmr1_jax.run.gap_monitor import LogProbGapMonitor
        from lmmr1_jax.run.gap_probe import GapProbe
        from lmmr1_jax.run.policy import open_policy
        from lmmr1_jax.run.step import Step
        from lmmr1_jax.runtime.device_memory import release_memory
        from lmmr1_jax.runtime.errors import SamplingFailed
        from lmmr1_jax.tracking.rollout_metrics import off_policy_steps
        from lmmr1_jax.tracking.stopwatch import Stopwatch
        from lmmr1_jax.tracking.tracker import Tracker

        config = registry.checked(config)
        check_rewards(config.rewards)
        stop.check()
        folder = open_parts.enter_context(open_run_folder(config))
        written = whole_steps(folder / "checkpoints")
        resumes = config.run.resume and bool(written)
        verifier = open_parts.enter_context(Verifier(config.rewards))
        skips = open_parts.enter_context(contextlib.closing(SkipLog(folder / "skipped.jsonl", keep=resumes)))
        policy = open_parts.enter_context(
            open_policy(config, resumed_at=max(written, default=0), check=stop.check)
        )
        rewards = open_parts.enter_context(setup.build_rewards(config, policy, verifier, stop.check))
        stop.check()
        prompts, evaluated = setup.read_data(config, policy.processor, verifier, skips)
        setup.try_rewards(rewards, prompts, policy.processor, config.rollout.completions)
        stop.check()
        held_out = HeldOut(evaluated, policy.processor, skips, workers=config.data.workers)
        loader = setup.build_prompt_loader(config, prompts, policy.processor, skips)
        open_parts.callback(loader.close)
        total_steps = setup.count_steps(config, len(prompts))
        learner = setup.build_learner(config, policy, total_steps * registry.updates_per_rollout(config))
        checkpoints = Checkpoints(folder / "checkpoints", keep=config.checkpoint.keep)
        open_parts.callback(checkpoints.close)
        step = Step(config, policy, learner, rewards.score)
        batches = RolloutQueue(
            loader,
            skips,
            step.begin,
            prompts=config.rollout.prompts,
            staleness=config.rollout.staleness,
            batches=total_steps,
        )
        gap = LogProbGapMonitor(config.rollout.gap_warn, config.rollout.gap_stop)
        # On the policy every step measures the gap itself.
        probe = GapProbe(config, policy, learner) if config.rollout.staleness else None

        # Where the run stands: `done` steps lie behind it, and these parts remember something between steps.
        remembering = {"batches": batches, "held_out": held_out, "shapes": step, "gap": gap, "rewards": rewards}
        if resumes:
            done, state, memory = checkpoints.restore_newest(learner.abstract_state())
            for name, part in remembering.items():
                part.load_state_dict(memory[name])
        else:
            done, state = 0, setup.initial_state(config, policy, learner)
        describe_run(folder, config, policy.source)
        policy.sampler.load(state.params, done)

        tracker = open_parts.enter_context(
            Tracker(folder, config, done if resumes else None, total_steps, decode=policy.processor.decode)
        )

        def evaluate_policy() -> float | None:
            if not held_out.prompts:
                return None
            with (watch := Stopwatch())("evaluate"):
                result = evaluate(
                    policy.sampler,
                    policy.processor.decode,
                    verifier,
                    held_out.encoded(),
                    SamplingSettings(
                        max_new_tokens=config.eval.max_new_tokens or config.rollout.max_new_tokens,
                        temperature=0.0,
                        key=sampling_key(config.run.seed, done),
                    ),
                    check=stop.check,
                )
            if not result.prompts:
                tracker.warn("no held-out prompt can be used, so there is no evaluation; skipped.jsonl says why")
                return None
            tracker.evaluation(done, result.summary() | {"seconds": watch.total})
            return result.accuracy

        def save(memory: dict[str, Any], score: float | None = None) -> None:
            checkpoints.save(done, state, memory, score=score)

        def leave(reason: Exception, memory: dict[str, Any]) -> None:
            """The run ends where it stands, and goes on from there."""
            if done not in checkpoints.steps():
                save(memory)
            checkpoints.wait()
            tracker.say(f"stopped by {reason} after step {done}; --resume goes on from there")
            raise reason

        def evaluation_due() -> bool:
            return done in (0, total_steps) or bool(config.eval.every and done % config.eval.every == 0)

        # Also by a run that was killed before its first checkpoint: evaluating can widen the sampler's shapes, and
        # with them change the last bits of what it samples.
        try:
            if evaluation_due() and done not in tracker.evaluations:
                evaluate_policy()
        except (StopRequested, SamplingFailed) as reason:
            leave(reason, {name: part.state_dict() for name, part in remembering.items()})

        first, left_out = done, int(state.skipped_updates)
        while done < total_steps:
            memory = {name: part.state_dict() for name, part in remembering.items()}
            watch = Stopwatch()
            try:
                stop.check()
                with watch("rollout"):
                    rollouts = batches.next(done)
                stop.check()
                with watch("score"):
                    rollouts = step.score(rollouts)
                rollouts = step.replace_equal(rollouts, loader.take, done, watch)
                policy.sampler.sleep()
                with watch("score"):
                    minibatches = step.prepare(rollouts, state)
                stop.check()
            except (StopRequested, SamplingFailed, RewardFailed) as reason:
                leave(reason, memory)
            with watch("learn"):
                state, metrics = step.update(state, minibatches)
            metrics |= off_policy_steps(rollouts, done)
            done += 1
            interrupted = None
            with watch("sync"):
                try:
                    policy.sampler.load(state.params, done, in_flight=config.rollout.weight_update == "in-flight")
                    if probe is not None:
                        metrics |= probe.measure(rollouts[0].encoded, state.params)
                except (StopRequested, SamplingFailed) as reason:
                    interrupted = reason  # the step is done all the same, and is written down first
                    if probe is not None:  # which did not measure it; the learner's own is of older weights
                        metrics = {name: value for name, value in metrics.items() if not name.startswith("gap/")}
            if done == first + 1:  # all programs are compiled
                release_memory()

            tokens = sum(len(completion.token_ids) for rollout in rollouts for completion in rollout.completions)
            tracker.log(
                done,
                metrics
                | {f"time/{phase}": seconds for phase, seconds in watch.seconds.items()}
                | {"tokens_per_second": tokens / watch.total, "skipped": skips.total, "animated": loader.animated},
                rollouts,
            )
            if (now_left_out := int(metrics["skipped_updates"])) > left_out:
                tracker.warn(f"step {done}: updates left out for gradients not finite: {now_left_out - left_out}")
                left_out = now_left_out
            for warning in rewards.warnings():
                tracker.warn(warning)
            if interrupted is None and (warning := gap.observe(done, metrics["gap/mean"])):
                tracker.warn(warning)

            last = done == total_steps
            score = None
            try:
                if interrupted is not None:
                    raise interrupted
                if evaluation_due():
                    score = evaluate_policy()
            except (StopRequested, SamplingFailed) as reason:
                leave(reason, {name: part.state_dict() for name, part in remembering.items()})
            if last or score is not None or done % config.checkpoint.every == 0:
                save({name: part.state_dict() for name, part in remembering.items()}, score)

        checkpoints.wait()
        return tracker.finish(skipped=skips.counts)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    config = parse_train_config(sys.argv[1:] if arguments is None else arguments, prog="python -m lmmr1_jax.train")
    from lmmr1_jax.runtime.stop_signal import StopRequested

    try:
        summary = train(config)
    except StopRequested as reason:
        if not Path(config.run.dir).exists():
            print(f"stopped by {reason} before anything was done")
        return 143
    before, after = (summary["evaluation"][when] for when in ("before", "after"))
    if before and after:
        print(
            f"greedy accuracy on {after['prompts']} held-out prompts: {before['accuracy']:.3f} before, "
            f"{after['accuracy']:.3f} after {summary['steps']} steps; the figures are in {config.run.dir}/summary.json"
        )
    return 0


if __name__ == "__main__":
    run_cli(main)
