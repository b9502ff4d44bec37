"""What a critic starts from: the policy's weights, or a reward model's with its score; and what it can't start from."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
import tiny_reward_model

from lmmr1_jax.algorithms.registry import checked
from lmmr1_jax.config.schema import AlgorithmConfig, CriticConfig, RolloutConfig, TrainConfig
from lmmr1_jax.learner.objectives.value import SCORE
from lmmr1_jax.packing.pack import gather, pack, plan_shapes
from lmmr1_jax.rewards.sources.reward_model import RewardModel
from lmmr1_jax.run import setup
from lmmr1_jax.run.critic_setup import build_critic, load_critic
from lmmr1_jax.run.policy import assemble_policy
from lmmr1_jax.runtime.errors import UserError
from lmmr1_jax.tasks.shapes import shape_prompts
from lmmr1_jax.types.records import Completion, Rollout


def config(**critic):
    return checked(
        TrainConfig(
            algorithm=AlgorithmConfig(name="ppo"),
            critic=CriticConfig(**critic),
            rollout=RolloutConfig(prompts=2, completions=2, max_new_tokens=8),
        )
    )


@functools.cache
def policy():
    return assemble_policy(config())


def critic_of(given):
    made = build_critic(given, policy().processor, policy().network, policy().source, policy().mesh)
    width = made.abstract_params[SCORE]["kernel"].shape[0]
    return made, load_critic(given, width, policy().source, policy().mesh)


def same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def test_an_own_critic_starts_from_the_policys_weights_with_a_small_head_of_its_own():
    made, params = critic_of(config())
    body = policy().load()
    body["language"].pop("head", None)
    assert same_bits({name: tree for name, tree in params.items() if name != SCORE}, body)
    width = made.backbone.config.text.hidden_size
    assert params[SCORE]["kernel"].shape == (width, 1) and 0 < np.abs(params[SCORE]["kernel"]).max() < 5 / width
    assert jax.tree.structure(params) == jax.tree.structure(made.abstract_params)


def test_a_shared_critic_is_a_head_alone():
    made, params = critic_of(config(backbone="shared"))
    assert made.backbone is None and list(params) == [SCORE]


def test_a_reward_model_brings_its_score_and_values_are_its_scores_of_what_stands_before_a_token(tmp_path):
    folder = tiny_reward_model.write(tmp_path / "rm", seed=3)
    given = config(path=str(folder))
    learner = setup.build_learner(given, policy(), 1)
    state = setup.initial_state(given, policy(), learner)
    processor, rng = policy().processor, np.random.default_rng(0)
    rollouts = [
        Rollout(processor.encode(prompt), tuple(
            Completion(rng.integers(5, 60, n).astype(np.int32), np.zeros(n, np.float32), "stop", np.zeros(n, np.int32))
            for n in lengths
        ))
        for prompt, lengths in zip(shape_prompts("heldout", 2), [(4, 7), (8, 2)], strict=True)
    ]  # fmt: skip
    vision = policy().network.config.vision
    shapes = plan_shapes(
        rollouts, learner=given.learner, max_new_tokens=8, vision=vision, minibatch_groups=2, row_devices=1,
        tokens_per_device=1024,
    )  # fmt: skip
    batch = pack(rollouts, shapes, vision, processor.patches)
    values = gather(learner.values(state, batch), batch, 4)
    model = RewardModel(
        folder, policy().mesh, compute_dtype=np.float32, image_format=processor.format, learner=given.learner,
        max_new_tokens=8,
    )  # fmt: skip
    shorter = [
        dataclasses.replace(
            r, completions=tuple(dataclasses.replace(c, token_ids=c.token_ids[:-1]) for c in r.completions)
        )
        for r in rollouts
    ]
    scores = [score for group in model.score(shorter) for score in group]
    np.testing.assert_allclose([row[-1] for row in values], scores, atol=1e-4)
    assert np.ptp(scores) > 0.01


def edited(folder, **fields):
    raw = json.loads((folder / "config.json").read_text())
    raw["vision_config"] |= fields
    (folder / "config.json").write_text(json.dumps(raw))


def test_a_critic_that_would_not_read_what_the_policy_reads_is_refused(tmp_path):
    folder = tiny_reward_model.write(tmp_path / "windows")
    edited(folder, window_size=56 if policy().network.config.vision.window_size != 56 else 112)
    with pytest.raises(UserError, match=r"critic.path: .*windows: its images have other windows"):
        critic_of(config(path=str(folder)))
    folder = tiny_reward_model.write(tmp_path / "text", model_type="qwen2", vision_config=None, rope_scaling=None)
    with pytest.raises(UserError, match=r"critic.path: .*text.* a model of text, which would not see"):
        critic_of(config(path=str(folder)))
    folder = tiny_reward_model.write(tmp_path / "words")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match=r"critic.path: .*words: its tokenizer is another"):
        critic_of(config(path=str(folder)))
    with pytest.raises(UserError, match="critic.path: .*missing"):
        critic_of(config(path=str(tmp_path / "missing")))
