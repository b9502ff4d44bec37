"""Every token is of the weights that it says it is of, also when they change while it is being waited for."""

import numpy as np
import pytest

pytest.importorskip("vllm")

import engine_cases as cases  # noqa: E402
from image_prompts import SIZES, prompt  # noqa: E402

LONG = 800
CLOSE = 1e-4
SMALL = 32 << 10
"""Bytes of a bucket that cuts most matrices of the model."""


@pytest.fixture(scope="module")
def weights(student):
    """The checkpoint's, the same with another head, and others altogether."""
    old = student.policy.load()
    with_another_head = {**old, "language": {**old["language"], "head": cases.noisy(old["language"]["head"], 1.0)}}
    return old, with_another_head, cases.noisy(old, 0.5)


@pytest.fixture(scope="module")
def with_images(student):
    return prompt(student.policy.processor, SIZES[2], 2)


def assert_sampled_by(params, instead_of, rollout, student):
    """The log-probs are of these weights, and far from those of the others."""
    own, others = (student.log_probs(p, [rollout]) for p in (params, instead_of))
    for completion, right, wrong in zip(rollout.completions, own, others, strict=True):
        np.testing.assert_allclose(completion.log_probs, right, atol=CLOSE)
        assert np.abs(wrong - right).mean() > 0.1


def test_a_completion_goes_on_under_the_weights_that_reach_it_in_its_midst(engine, student, weights, with_images):
    # Only the head changes: keys and values that were kept are then what the new weights would have made.
    old, new, _ = weights
    before = engine.sync(old)
    running = engine.in_the_midst(with_images, 2, LONG)
    engine.ask("begin_update", True)
    waiting = engine.begin(with_images, 1, 4, urgent=True, ignore_ends=True)
    assert not cases.finished(waiting, 1.5)
    engine.send(new)
    assert not cases.finished(waiting, 0.5) and not cases.finished(running)
    after = engine.next_version()
    engine.ask("finish_update", after)
    rollout = cases.group(with_images, running)
    under_old, under_new = (student.log_probs(params, [rollout]) for params in (old, new))
    for completion, as_old, as_new in zip(rollout.completions, under_old, under_new, strict=True):
        versions = completion.policy_version
        assert len(versions) == LONG and (np.diff(versions) >= 0).all() and {*versions} == {before, after}
        later = versions == after
        np.testing.assert_allclose(completion.log_probs, np.where(later, as_new, as_old), atol=CLOSE)
        assert np.abs(as_new - as_old)[later].mean() > 0.1 < np.abs(as_new - as_old)[~later].mean()
    assert (cases.group(with_images, waiting).completions[0].policy_version == after).all()


def test_a_group_begun_after_the_sync_has_nothing_of_the_old_weights_while_another_runs_on(
    engine, student, weights, with_images
):
    old, _, new = weights
    engine.sync(old)
    assert_sampled_by(old, new, engine.sample(with_images, 2, 12), student)  # its prefix and images are cached now
    running = engine.in_the_midst(with_images, 2, 4 * LONG)
    after = engine.sync(new, in_flight=True)
    rollout = engine.sample(with_images, 2, 12)
    assert not cases.finished(running)
    assert_sampled_by(new, old, rollout, student)
    assert all((completion.policy_version == after).all() for completion in rollout.completions)
    assert cases.group(with_images, running).completions[0].policy_version[-1] == after


def test_a_draining_update_waits_for_completions_to_end_and_others_wait_for_it(engine, student, weights, with_images):
    old, _, new = weights
    before = engine.sync(old)
    running = engine.in_the_midst(with_images, 2, LONG)
    beginning = engine.handle.begin_update.remote(False)
    waiting = engine.begin(with_images, 2, 12, urgent=True)
    cases.finished(beginning, cases.PATIENCE)
    assert cases.finished(running, 5.0)
    rollout = cases.group(with_images, running)
    assert all((completion.policy_version == before).all() for completion in rollout.completions)
    assert_sampled_by(old, new, rollout, student)
    engine.send(new)
    assert not cases.finished(waiting, 1.0)
    after = engine.next_version()
    engine.ask("finish_update", after)
    rollout = cases.group(with_images, waiting)
    assert all((completion.policy_version == after).all() for completion in rollout.completions)
    assert_sampled_by(new, old, rollout, student)


def test_weights_in_many_buckets_and_tensors_in_pieces_are_those_in_one_bucket(engine, student, weights):
    old, _, new = weights
    prompts = [prompt(student.policy.processor, sizes, number) for number, sizes in enumerate(SIZES)]
    stream = engine.stream(new, bucket_bytes=SMALL)
    assert sum(1 for _ in stream.buckets()) > 2 * len(stream) > 100
    said = []
    for bucket_bytes in (cases.ONE_BUCKET, SMALL):
        engine.sync(old)
        engine.sync(new, bucket_bytes=bucket_bytes)
        said.append([engine.sample(encoded, 1, 12, temperature=0).completions[0] for encoded in prompts])
    for one, many in zip(*said, strict=True):
        assert one.token_ids.tolist() == many.token_ids.tolist() and (one.log_probs == many.log_probs).all()
