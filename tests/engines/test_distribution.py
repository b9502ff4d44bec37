"""Engines sample from the learner's policy: banned tokens, temperature, ends and limits."""

import numpy as np
import pytest

pytest.importorskip("vllm")

import engine_cases as cases  # noqa: E402
from image_prompts import SIZES, prompt  # noqa: E402

from lmmr1_jax.data.images import MAX_ASPECT_RATIO, final_size  # noqa: E402
from lmmr1_jax.rollout.local.scoring import Scorer  # noqa: E402

CLOSE = 1e-4
NEW_TOKENS = 24


def with_louder_rows(params, ids, factor):
    """The parameters with some rows of the head made larger: these tokens' logits are now extreme, up or down."""
    head = np.array(params["language"]["head"]["embedding"])
    head[list(ids)] *= factor
    return {**params, "language": {**params["language"], "head": {"embedding": head}}}


@pytest.mark.parametrize("temperature", [1.0, 0.0], ids=["sampled", "greedy"])
def test_banned_tokens_never_come_where_they_are_the_likeliest_by_far(engine, student, temperature):
    policy, processor = student.policy, student.policy.processor
    params = with_louder_rows(policy.load(), processor.banned_ids, 20.0)
    engine.sync(params)
    encoded = prompt(processor, SIZES[1], 1)
    rollout = engine.sample(encoded, 8, NEW_TOKENS, temperature=temperature)
    assert len(rollout.completions) == 8
    tokens = np.concatenate([completion.token_ids for completion in rollout.completions])
    assert not np.isin(tokens, processor.banned_ids).any()
    own = student.log_probs(params, [rollout])
    for completion, expected in zip(rollout.completions, own, strict=True):
        np.testing.assert_allclose(completion.log_probs, expected, atol=CLOSE)
    # Nothing being banned, the same tokens would have had this share of the probability left to them.
    scorer = Scorer(policy.network, params, processor.patches)
    unbanned = scorer.score([(encoded, completion.token_ids) for completion in rollout.completions])
    left = np.exp(np.concatenate(unbanned) - np.concatenate(own))
    assert np.mean(left < 0.01) > 0.5


def test_an_image_that_patches_make_thinner_than_vllm_would_resize_is_taken_as_it_is(engine, student):
    height, width = final_size(41, 8200, 3136, 1_003_520, 28)
    assert 8200 / 41 <= MAX_ASPECT_RATIO < width / height
    params = student.policy.load()
    engine.sync(params)
    rollout = engine.sample(prompt(student.policy.processor, [(height, width)], 0), 2, NEW_TOKENS)
    for completion, own in zip(rollout.completions, student.log_probs(params, [rollout]), strict=True):
        np.testing.assert_allclose(completion.log_probs, own, atol=CLOSE)


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_log_probs_are_of_the_tempered_distribution(engine, student, temperature):
    params = student.policy.load()
    engine.sync(params)
    tempered = cases.Student(cases.config(engine.folder, temperature=temperature))
    rollout = engine.sample(prompt(student.policy.processor, [], 0), 8, NEW_TOKENS, temperature=temperature)
    at_one = np.concatenate(student.log_probs(params, [rollout]))
    own = np.concatenate(tempered.log_probs(params, [rollout]))
    sampled = np.concatenate([completion.log_probs for completion in rollout.completions])
    np.testing.assert_allclose(sampled, own, atol=CLOSE)
    assert np.abs(at_one - own).mean() > 0.05


def test_end_tokens_belong_to_completions_and_what_the_limit_cuts_has_none(engine, student):
    ends = student.policy.processor.end_ids
    params = with_louder_rows(student.policy.load(), ends, 3.0)
    engine.sync(params)
    rollout = engine.sample(prompt(student.policy.processor, [], 0), 32, NEW_TOKENS)
    for completion in rollout.completions:
        ended = np.isin(completion.token_ids, ends)
        assert not ended[:-1].any() and len(completion.log_probs) == len(ended) == len(completion.policy_version)
        assert completion.finish_reason == ("stop" if ended[-1] else "length")
        assert ended[-1] or len(ended) == NEW_TOKENS
    assert {completion.finish_reason for completion in rollout.completions} == {"stop", "length"}
    for completion, own in zip(rollout.completions, student.log_probs(params, [rollout]), strict=True):
        np.testing.assert_allclose(completion.log_probs, own, atol=CLOSE)
