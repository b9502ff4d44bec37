"""Reward models as sources: what fits a policy and what doesn't, devices, shapes, faults."""

import json
import re
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny_reward_model
from whole_runs import on_eight_devices

from lmmr1_jax.config.schema import LearnerConfig, MeshConfig, RewardsConfig
from lmmr1_jax.data.processor import Processor
from lmmr1_jax.parallel.sharding import make_mesh
from lmmr1_jax.rewards.sources.base import Group, Rewards
from lmmr1_jax.rewards.sources.model import open_model
from lmmr1_jax.rewards.sources.specs import ModelSpec, check_rewards, read_models
from lmmr1_jax.rewards.workers.pool import WorkerFailure
from lmmr1_jax.rollout.loaded_model import TINY_MODEL
from lmmr1_jax.runtime.compilation import CompilationCounter
from lmmr1_jax.runtime.errors import UserError
from lmmr1_jax.tasks.shapes import shape_prompts
from lmmr1_jax.types.records import Completion, Rollout

MESHES = ("data and tensor", "fsdp", "all")


@pytest.fixture(scope="module")
def processor():
    return Processor(TINY_MODEL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_reward_model.write(tmp_path_factory.mktemp("models") / "helpful")


def opened(folder, processor, *, weight=1.0, name="helpful", compute_dtype=np.float32):
    return open_model(
        ModelSpec(name, weight, str(folder)),
        processor,
        make_mesh(MeshConfig()),
        compute_dtype=compute_dtype,
        learner=LearnerConfig(),
        max_new_tokens=20,
    )


def groups(processor, count, longest=20, seed=0):
    rng, made = np.random.default_rng(seed), []
    for prompt in shape_prompts("train", count):
        ids = [rng.integers(0, 256, rng.integers(1, longest)).astype(np.int32) for _ in range(2)]
        completions = tuple(Completion(i, np.zeros(len(i), np.float32), "stop", np.zeros_like(i)) for i in ids)
        made.append(Group(Rollout(processor.encode(prompt), completions), processor.decode))
    return made


def test_several_models_add_their_weighted_scores_and_each_is_a_part(folder, processor, tmp_path):
    other = tiny_reward_model.write(tmp_path / "other", seed=1)
    sources = [opened(folder, processor, weight=0.5), opened(other, processor, weight=-2.0, name="brief")]
    asked = groups(processor, 3)
    scored = Rewards(sources, processor.decode, on_error="stop").score([group.rollout for group in asked])
    rewards = [reward for rollout in scored for reward in rollout.rewards]
    assert len({reward.parts["helpful"] for reward in rewards}) == 6
    for reward in rewards:
        assert set(reward.parts) == {"helpful", "brief"}
        assert reward.total == pytest.approx(0.5 * reward.parts["helpful"] - 2.0 * reward.parts["brief"])


def test_weights_are_held_in_the_dtype_that_the_policy_computes_in(folder, processor):
    asked = groups(processor, 2)
    exact, coarse = opened(folder, processor), opened(folder, processor, compute_dtype=ml_dtypes.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(coarse.model.params)} == {np.dtype(ml_dtypes.bfloat16)}
    scores = [[v.total for verdicts in source.score(asked) for v in verdicts] for source in (exact, coarse)]
    np.testing.assert_allclose(*scores, rtol=0, atol=0.1)
    assert np.ptp(scores[0]) > 0.2


def test_batches_of_other_lengths_and_sizes_compile_nothing_new(folder, processor):
    source = opened(folder, processor)
    source.score(groups(processor, 4))
    counter = CompilationCounter()
    for count, longest in ((4, 6), (9, 20), (1, 3)):
        source.score(groups(processor, count, longest, seed=count))
    counter.close()
    assert counter.names == []


def test_a_resumed_run_scores_in_the_shapes_that_it_had(folder, processor):
    first, again = opened(folder, processor), opened(folder, processor)
    first.score(groups(processor, 2))
    remembered = json.loads(json.dumps(Rewards([first], processor.decode, on_error="stop").state_dict()))
    asked = groups(processor, 5, seed=3)
    Rewards([again], processor.decode, on_error="stop").load_state_dict(remembered)
    assert again.score(asked) == first.score(asked)
    assert again.model.shapes == first.model.shapes


def test_a_score_that_is_not_finite_and_a_token_without_embedding_are_faults(folder, processor, tmp_path):
    broken = tiny_reward_model.write(tmp_path / "broken")
    tiny_reward_model.change(broken, score__weight=np.full((1, 128), np.nan, np.float32))
    asked = groups(processor, 1)
    for verdict in opened(broken, processor).score(asked)[0]:
        assert verdict == WorkerFailure("error", f"{broken} gave the score nan")
    asked[0].rollout.completions[1].token_ids[0] = 592
    first, second = opened(folder, processor).score(asked)[0]
    assert not isinstance(first, WorkerFailure)
    assert second == WorkerFailure("error", f"{folder} has no embedding for the sampled token 592")


def test_a_model_of_text_judges_images_by_their_tokens_and_says_so(processor, tmp_path, caplog):
    text = tiny_reward_model.write(tmp_path / "text", model_type="qwen2", vision_config=None, rope_scaling=None)
    vision = [name for name in tiny_reward_model.names(text) if name.startswith("visual.")]
    tiny_reward_model.change(text, **dict.fromkeys(vision))
    source, asked = opened(text, processor), groups(processor, 1)
    source.check(asked[0])
    assert "does not see the images" in caplog.text
    assert all(np.isfinite(verdict.total) for verdict in source.score(asked)[0])


def with_another_tokenizer(folder):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("<|quad_start|>", "<|quad_begin|>"))
    (folder / "tokenizer_config.json").unlink()


BAD = {
    "another tokenizer": (with_another_tokenizer, r"2 tokens differ, '<\|quad_(start|begin)\|>' is "),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json"),
    "no score": (lambda f: tiny_reward_model.change(f, score__weight=None), r"1 missing \(score.weight\).*weight \[1"),
    "two scores": (
        lambda f: tiny_reward_model.change(f, score__weight=np.zeros((2, 128), np.float32)),
        r"1 mis-shaped \(score.weight \[2, 128\] for \[1, 128\]\)",
    ),
    "a tensor too many": (
        lambda f: tiny_reward_model.change(f, score__bias=np.zeros(1, np.float32)),
        r"1 unexpected \(score.bias\)",
    ),
    "too few embeddings": (lambda f: set_config(f, vocab_size=500), "has 500 embeddings.*tokens up to 591"),
    "another image token": (lambda f: set_config(f, image_token_id=589), "image_token_id is 589.*is 590"),
    "an unknown family": (lambda f: set_config(f, model_type="llama"), "model_type 'llama' is not supported"),
    "half a file": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]),
        "model.safetensors",
    ),
}


def set_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("name", BAD)
def test_a_model_that_does_not_fit_is_refused_in_one_line(name, processor, tmp_path):
    spoil, said = BAD[name]
    folder = tiny_reward_model.write(tmp_path / "model")
    spoil(folder)
    with pytest.raises(UserError, match=said) as error:
        opened(folder, processor)
    assert str(error.value).startswith(f"rewards.models: {folder}") and "\n" not in str(error.value)


def test_entries_name_a_folder_and_perhaps_a_metric_and_a_weight(folder):
    specs = read_models(RewardsConfig(models=(str(folder), f"nice={folder}*0.5")))
    assert specs == [ModelSpec("helpful", 1.0, str(folder)), ModelSpec("nice", 0.5, str(folder))]


@pytest.mark.parametrize(
    ("models", "said"),
    [
        (("nowhere/at/all",), "nowhere/at/all: there is no Hugging Face folder"),
        (("{}*much",), "is not [NAME=]FOLDER[*WEIGHT]"),
        (("{}", "{}"), "two rewards are called 'helpful'"),
        (("accuracy={}",), "a reward is called 'accuracy'"),
    ],
)
def test_entries_that_make_no_sense_are_refused_before_anything_is_loaded(folder, models, said):
    with pytest.raises(UserError, match=re.escape(said)):
        check_rewards(RewardsConfig(models=tuple(entry.format(folder) for entry in models)))


@pytest.fixture(scope="module")
def found():
    return on_eight_devices(Path(__file__).parent / "score_on_meshes.py", ["--xla_backend_optimization_level=0"])


@pytest.mark.parametrize(("mesh", "parts"), zip(MESHES, (2, 8, 4), strict=True))
def test_scores_on_eight_devices_are_those_on_one(found, mesh, parts):
    assert found["devices"] == 8 and np.std(found["one"]["scores"]) > 0.05
    np.testing.assert_allclose(found[mesh]["scores"], found["one"]["scores"], rtol=0, atol=1e-5)
    whole, shard = found[mesh]["shard"]
    assert shard * parts == whole
