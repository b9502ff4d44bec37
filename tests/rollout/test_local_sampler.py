"""The sampler and the scorer against transformers, for every family, with images."""

import numpy as np
import pytest

pytest.importorskip("torch")

import jax
import oracle
from image_prompts import SIZES, prompt, vision_arguments

from lmmr1_jax.data.processor import Processor
from lmmr1_jax.models.network import build
from lmmr1_jax.rollout.local.sampler import JaxSampler, sampling_key
from lmmr1_jax.rollout.local.scoring import Scorer
from lmmr1_jax.rollout.sampler import SamplingSettings, sample
from weights_bridge.config_json import read_architecture
from weights_bridge.load import load

NEW_TOKENS = 24


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", oracle.KINDS)
def test_greedy_and_scores_equal_transformers(kind, tied):
    folder = oracle.random_model(kind, tied)
    processor, network = Processor(folder), build(read_architecture(folder))
    params = load(folder)
    sampler = JaxSampler(
        network, banned_ids=processor.banned_ids, end_ids=processor.end_ids, patches_of=processor.patches
    )
    sampler.load(params)
    prompts = [prompt(processor, sizes if kind != "qwen2" else [], i) for i, sizes in enumerate(SIZES)]
    groups = sample(
        sampler, prompts, 2, SamplingSettings(max_new_tokens=NEW_TOKENS, key=sampling_key(0, 0), temperature=0)
    )
    scores = Scorer(network, params, processor.patches, rows=2).score(
        [(encoded, group[0].token_ids) for encoded, group in zip(prompts, groups, strict=True)]
    )
    model = oracle.load_model(folder)
    for encoded, (completion, twin), score in zip(prompts, groups, scores, strict=True):
        vision = vision_arguments(processor, encoded)
        ids = completion.token_ids.tolist()
        expected = oracle.hf_generate(
            model, encoded.token_ids, max_new_tokens=NEW_TOKENS, suppress=processor.banned_ids, **vision
        )
        assert ids == expected == twin.token_ids.tolist()
        policy = oracle.hf_log_probs(model, encoded.token_ids, ids, banned=processor.banned_ids, **vision)
        np.testing.assert_allclose(completion.log_probs, policy, atol=1e-4)
        np.testing.assert_allclose(score, oracle.hf_log_probs(model, encoded.token_ids, ids, **vision), atol=1e-4)


def test_sampled_log_probs_with_images_equal_transformers():
    folder = oracle.random_model("qwen2_5_vl", True)
    processor, network = Processor(folder), build(read_architecture(folder))
    sampler = JaxSampler(
        network, banned_ids=processor.banned_ids, end_ids=processor.end_ids, patches_of=processor.patches
    )
    sampler.load(load(folder))
    prompts = [prompt(processor, sizes, i) for i, sizes in enumerate(SIZES)]
    groups = sample(
        sampler,
        prompts,
        3,
        SamplingSettings(max_new_tokens=12, key=sampling_key(0, 0), temperature=0.8, top_p=0.9, top_k=50),
    )
    model = oracle.load_model(folder)
    for encoded, group in zip(prompts, groups, strict=True):
        for completion in group:
            expected = oracle.hf_log_probs(
                model,
                encoded.token_ids,
                completion.token_ids,
                banned=processor.banned_ids,
                temperature=0.8,
                **vision_arguments(processor, encoded),
            )
            np.testing.assert_allclose(completion.log_probs, expected, atol=1e-4)


def test_a_second_batch_of_the_same_shapes_compiles_nothing():
    from lmmr1_jax.runtime.compilation import CompilationCounter

    folder = oracle.random_model("qwen2_5_vl", True)
    processor, network = Processor(folder), build(read_architecture(folder))
    sampler = JaxSampler(
        network, banned_ids=processor.banned_ids, end_ids=processor.end_ids, patches_of=processor.patches
    )
    params = load(folder)
    prompts = [prompt(processor, sizes, i) for i, sizes in enumerate(SIZES)]
    for step, batch in enumerate((prompts, prompts[::-1])):
        counter = CompilationCounter()
        sampler.load(jax.tree.map(lambda leaf: leaf, params), step)
        sample(sampler, batch, 2, SamplingSettings(max_new_tokens=4, key=sampling_key(0, step)))
        compiled = counter.names
        counter.close()
    assert compiled == []
