"""How much of the returns PPO's critic predicts with the images, and how much the same critic does without them.

    python scripts/probe_critic_vision.py --steps 100

The starting policy of `configs/demo/ppo.py` writes completions and stays as it is (`critic.freezing_actor_steps`), so
that rewards depend on prompts and completions alone. Two critics start from the same parameters and learn from the same
completions; for the blind one `<|image_pad|>`'s embedding stands where an image's features should. Both are then asked
for the values of every token of completions of held-out prompts, and of two kinds of tokens among them: each
completion's first, whose state is the prompt alone, and its last, before which the answer has been written.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lmmr1_jax.algorithms import registry
from lmmr1_jax.algorithms.ppo import critic_metrics
from lmmr1_jax.config.command_line import load_config_file
from lmmr1_jax.config.schema import TrainConfig
from lmmr1_jax.data.skips import SkipLog
from lmmr1_jax.learner.learner import Learner
from lmmr1_jax.learner.state import TrainState
from lmmr1_jax.packing.pack import gather
from lmmr1_jax.rewards.rules.service import Verifier
from lmmr1_jax.run import setup
from lmmr1_jax.run.policy import assemble_policy
from lmmr1_jax.run.step import Step
from lmmr1_jax.runtime.cli import run_cli
from lmmr1_jax.types.batches import PackedBatch
from lmmr1_jax.types.records import EncodedPrompt

CRITICS = ("sighted", "blind")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(Path(__file__).parents[1] / "configs" / "demo" / "ppo.py"))
    parser.add_argument("--steps", type=int, default=100, help="updates of each critic")
    parser.add_argument("--every", type=int, default=25, help="updates between measurements")
    parser.add_argument("--held-out", type=int, default=256, help="held-out prompts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where the figures go as well")
    arguments = parser.parse_args(argv)
    config = load_config_file(arguments.config)
    config = registry.checked(
        dataclasses.replace(
            config,
            run=dataclasses.replace(config.run, seed=arguments.seed),
            critic=dataclasses.replace(config.critic, freezing_actor_steps=arguments.steps),
        )
    )
    with Verifier(config.rewards) as verifier:
        measured = compare(config, verifier, arguments.steps, arguments.every, arguments.held_out)
    if arguments.json:
        arguments.json.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    return 0


def compare(config: TrainConfig, verifier: Verifier, steps: int, every: int, held_out: int) -> list[dict[str, float]]:
    """Explained variances of both critics' values on held-out prompts; a record for every measurement."""
    policy, skips = assemble_policy(config), SkipLog()
    prompts, unseen = setup.read_data(config, policy.processor, verifier, skips)
    loader = setup.build_prompt_loader(config, prompts, policy.processor, skips)
    learner = setup.build_learner(config, policy, steps * registry.updates_per_rollout(config))
    rewards = setup.build_rewards(config, policy, verifier, lambda: None)
    step = Step(config, policy, learner, rewards.score)
    states = {name: setup.initial_state(config, policy, learner) for name in CRITICS}
    policy.sampler.load(policy.load(), 0)  # a copy of its own: updates donate theirs

    def sampled(prompts: Sequence[EncodedPrompt], number: int, state: TrainState) -> list[PackedBatch]:
        return step.prepare(step.score(step.begin(prompts, number)()), state)[0]

    size = config.rollout.prompts
    encoded = [policy.processor.encode(prompt) for prompt in unseen[:held_out]]
    # Step numbers that training does not come to: the sampler's seeds.
    exam = [
        batch
        for number, at in enumerate(range(0, len(encoded), size))
        for batch in sampled(encoded[at : at + size], steps + number, states["sighted"])
    ]
    measured = []
    for number in range(steps + 1):
        if number % every == 0 or number == steps:
            measured.append({"updates": number * registry.updates_per_rollout(config)})
            for name, state in states.items():
                measured[-1] |= {f"{name}, {where}": x for where, x in explained(learner, state, exam, name).items()}
            print("  ".join(f"{key} {value:.3g}" for key, value in measured[-1].items()), flush=True)
        if number < steps:
            batches = sampled(loader.take(size), number, states["sighted"])
            for name in CRITICS:
                for batch in batches:
                    seen = as_seen_by(name, batch)
                    seen = dataclasses.replace(seen, values=learner.values(states[name], seen))
                    states[name], _ = learner.update(states[name], seen)
    loader.close()
    return measured


def explained(learner: Learner, state: TrainState, exam: Sequence[PackedBatch], name: str) -> dict[str, float]:
    """1 - Var(return - value) / Var(return) over all tokens, over first tokens, and over last tokens."""
    values, returns = [], []
    for batch in exam:
        count = int(batch.completions_total)
        values += gather(learner.values(state, as_seen_by(name, batch)), batch, count)
        returns += gather(batch.returns, batch, count)
    kinds = {"all": slice(None), "first": slice(0, 1), "last": slice(-1, None)}
    return {
        kind: critic_metrics([v[part] for v in values], [r[part] for r in returns])["value/explained_variance"]
        for kind, part in kinds.items()
    }


def as_seen_by(name: str, batch: PackedBatch) -> PackedBatch:
    """The batch; for the blind critic no slot takes an image's features."""
    if name == "sighted":
        return batch
    return dataclasses.replace(batch, image_slots=np.full_like(batch.image_slots, -1))


if __name__ == "__main__":
    run_cli(main)
