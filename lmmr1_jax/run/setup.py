"""The parts of a run, put together from its config: nothing here decides anything, it only connects."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lmmr1_jax.algorithms.registry import needs_critic
from lmmr1_jax.config.schema import TrainConfig
from lmmr1_jax.data.faults import SkipPrompt
from lmmr1_jax.data.processor import Processor
from lmmr1_jax.data.prompt_loader import PromptLoader
from lmmr1_jax.data.prompt_set import PromptCursor, read_prompts, split_holdout
from lmmr1_jax.data.skips import SkipLog
from lmmr1_jax.learner.learner import Learner
from lmmr1_jax.learner.objectives.value import CRITIC, SCORE
from lmmr1_jax.learner.state import TrainState
from lmmr1_jax.rewards.rules.assignment import check_sources, choose, readable
from lmmr1_jax.rewards.rules.service import Verifier
from lmmr1_jax.rewards.sources.base import Rewards, RewardSource, RuleSource
from lmmr1_jax.rewards.sources.function import FunctionSource
from lmmr1_jax.rewards.sources.http import ServerSource
from lmmr1_jax.rewards.sources.model import open_model
from lmmr1_jax.rewards.sources.specs import read_functions, read_models, read_servers
from lmmr1_jax.rollout.loaded_model import EMBEDDED_MODEL
from lmmr1_jax.run.critic_setup import build_critic, load_critic
from lmmr1_jax.run.learner_setup import assemble_learner
from lmmr1_jax.run.policy import PolicyModel
from lmmr1_jax.runtime.errors import UserError
from lmmr1_jax.tasks.shapes import shape_prompts
from lmmr1_jax.types.records import FINISH_LENGTH, Completion, Prompt, Rollout

EMBEDDED_DATA = "embedded:shapes"
SHAPES_TO_TRAIN_ON, SHAPES_HELD_OUT = 32_768, 1_024


def build_learner(config: TrainConfig, policy: PolicyModel, total_updates: int) -> Learner:
    """The learner of a policy, and of its critic where the algorithm has one."""
    critic = None
    if needs_critic(config):
        critic = build_critic(config, policy.processor, policy.network, policy.source, policy.mesh)
    return assemble_learner(
        config,
        policy.network,
        policy.axes(),
        policy.mesh,
        total_updates,
        banned_ids=policy.processor.banned_ids,
        critic=critic,
    )


def initial_state(config: TrainConfig, policy: PolicyModel, learner: Learner) -> TrainState:
    """What training starts from: the checkpoint's parameters, and those of the critic where there is one."""
    if not needs_critic(config):
        return learner.init_state(policy.load())
    head = learner.trainables[CRITIC].params[SCORE]["kernel"]
    return learner.init_state(policy.load(), critic=load_critic(config, head.shape[0], policy.source, policy.mesh))


def read_data(
    config: TrainConfig, processor: Processor, verifier: Verifier, skips: SkipLog
) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to train on and prompts held out for evaluation.

    Every prompt has its verifier, and a gold answer that this one can read; but `rewards.variant lmm-r1` keeps rows
    whose answer can't be read, and where `rewards.accuracy_weight` is 0 nobody needs one.
    """
    if config.data.path in ("", EMBEDDED_DATA):
        prompts = shape_prompts("train", SHAPES_TO_TRAIN_ON)
        held_out = [] if config.eval.path else shape_prompts("heldout", SHAPES_HELD_OUT)
        prompts, held_out = (choose(part, config.rewards) for part in (prompts, held_out))
    else:
        prompts = _read(config.data.path, config, processor, verifier, skips)
        if not config.eval.path:
            prompts, held_out = split_holdout(prompts)
    if config.eval.path:
        held_out = _read(config.eval.path, config, processor, verifier, skips)
    check_sources(config.rewards, prompts + held_out)
    return prompts, held_out[: config.eval.size or None]


def _read(path: str, config: TrainConfig, processor: Processor, verifier: Verifier, skips: SkipLog) -> list[Prompt]:
    prompts = read_prompts(
        path,
        prompt_key=config.data.prompt_key,
        answer_key=config.data.answer_key,
        need_answer=config.rewards.accuracy_weight != 0,
        verifier_key=config.data.verifier_key,
        special_tokens=processor.special_tokens,
        skips=skips,
    )
    prompts = choose(prompts, config.rewards, config.data.verifier_key)
    if config.rewards.variant == "lmm-r1" or not config.rewards.accuracy_weight:
        return prompts
    return readable(prompts, verifier, skips)


def build_rewards(
    config: TrainConfig, policy: PolicyModel, verifier: Verifier, interrupt: Callable[[], None]
) -> Rewards:
    """All that judges completions, started; `interrupt` is called while a server is waited for and may raise."""
    with contextlib.ExitStack() as started:
        sources: list[RewardSource] = [RuleSource(verifier)]
        for spec in read_functions(config.rewards):
            sources.append(FunctionSource(spec, config.rewards))
            started.callback(sources[-1].close)
        sources += [ServerSource(spec, config.rewards, interrupt) for spec in read_servers(config.rewards)]
        for spec in read_models(config.rewards):
            model = open_model(
                spec,
                policy.processor,
                policy.mesh,
                compute_dtype=policy.network.compute_dtype,
                learner=config.learner,
                max_new_tokens=config.rollout.max_new_tokens,
                attention=policy.network.attention,
            )
            sources.append(model)
        started.pop_all()  # `Rewards` closes them from here on
    return Rewards(sources, policy.processor.decode, on_error=config.rewards.on_error)


def try_rewards(rewards: Rewards, prompts: list[Prompt], processor: Processor, completions: int) -> None:
    """Lets every source judge the right answer to a prompt, in a group of the usual size.

    Raises:
      UserError: one of them can't.
    """
    for prompt in prompts[:8]:
        try:
            encoded = processor.encode(prompt)
        except SkipPrompt:
            continue
        answer = processor.encode_text(f"<think> </think><answer> {prompt.label or ''} </answer>")
        nothing = np.zeros(len(answer), np.float32)
        completion = Completion(answer, nothing, FINISH_LENGTH, nothing.astype(np.int32))
        rewards.check(Rollout(encoded, (completion,) * completions))
        return


def build_prompt_loader(
    config: TrainConfig, prompts: list[Prompt], processor: Processor, skips: SkipLog
) -> PromptLoader:
    """The prompts to train on, in the run's order."""
    cursor = PromptCursor(prompts, seed=config.run.seed, shuffle=config.data.shuffle)
    return PromptLoader(cursor, processor, skips, workers=config.data.workers)


def count_steps(config: TrainConfig, prompts: int) -> int:
    """Steps of the whole run."""
    steps = config.run.steps or config.data.epochs * prompts // config.rollout.prompts
    if steps < 1:
        raise UserError(
            f"{prompts} prompts give no step of rollout.prompts={config.rollout.prompts}: lower it or set run.steps"
        )
    if config.critic.freezing_actor_steps >= steps:
        raise UserError(
            f"critic.freezing_actor_steps is {config.critic.freezing_actor_steps}, but the run has {steps} steps: the "
            "policy would never be trained; it must be fewer"
        )
    return steps


def introduction(config: TrainConfig, policy: PolicyModel, prompts: int, held_out: int, total_steps: int) -> list[str]:
    """What a run says of itself before its first step: model, data, devices and folder, a line each.

    Args:
      config: the run's.
      policy: the model on its devices.
      prompts, held_out: prompts to train on and to evaluate with.
      total_steps: of the whole run.
    """
    network, devices = policy.network, policy.mesh.devices.ravel()
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(network.abstract_params))
    mesh = " x ".join(f"{axis} {size}" for axis, size in policy.mesh.shape.items())
    kind = devices[0].device_kind
    rollout, data = config.rollout, config.data.path
    lines = [
        f"model    {config.model.path or EMBEDDED_MODEL}: {network.config.model_type}, {parameters:,} parameters, "
        f"products in {jnp.dtype(network.compute_dtype).name}",
        f"data     {data or EMBEDDED_DATA}: {prompts:,} prompts to train on, {held_out:,} to evaluate with",
        f"devices  {devices.size} {kind}, mesh {mesh}, attention by {network.attention}",
        f"run      {config.run.dir}: {total_steps:,} steps of {rollout.prompts} prompts x {rollout.completions} "
        f"completions, {config.algorithm.name}, sampled by {rollout.sampler}",
    ]
    unset = [
        f"{flag} is not set, so this run trains {what}"
        for flag, path, what in (
            ("--model.path", config.model.path, "the tiny Qwen2.5-VL that ships with the package"),
            ("--data.path", data, "on generated images of coloured shapes"),
        )
        if not path
    ]
    return lines + (["note: " + "; ".join(unset)] if unset else [])
