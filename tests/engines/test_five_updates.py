"""Engines follow a learner through five updates, and stand where vLLM would stand that had never known other weights.

Comparing an engine with itself, or with the learner at a single version, would not do: vLLM can go on with a tied
head that is as old as its start, with image features of a vision tower that is no more, and with statistics of
pixels that no checkpoint holds. So there is a model of every family, tied and untied heads, prompts with and without
images, and, after the fifth update, three that had no part in any of it: an engine that is given the last weights and
no others, vLLM with its own loader over the exported checkpoint, and transformers.
"""

import dataclasses

import numpy as np
import pytest

pytest.importorskip("vllm")

import engine_cases as cases  # noqa: E402
import oracle  # noqa: E402
import ray  # noqa: E402
from image_prompts import SIZES, prompt, vision_arguments  # noqa: E402

from lmmr1_jax.rollout.engines.vllm.open import open_engines  # noqa: E402
from lmmr1_jax.rollout.local.sampler import sampling_key  # noqa: E402
from lmmr1_jax.rollout.sampler import SamplingSettings, sample  # noqa: E402
from lmmr1_jax.types.records import Completion, EncodedPrompt, Rollout  # noqa: E402
from weights_bridge.export import export  # noqa: E402

NEW_TOKENS = 12
CLOSE = 1e-4
"""Nats. What is promised is 1e-3; float32 on both sides comes nearer, by processor and size of batch."""
CLOSE_ON_AVERAGE = 1e-5
MOVED = 0.02
"""Nats by which each update changes what is sampled, at least."""


@dataclasses.dataclass(frozen=True)
class History:
    """What was sampled under each of the versions 0 to 5, by whom, and the weights of the last.

    Attributes:
      gaps: `[version][completion]`, |learner's - engine's| log-probs of completions at temperature 1.
      greedy: `[version][prompt]`, the engine's likeliest completions.
      builtin: the same by the built-in sampler.
      fresh: the likeliest completions by an engine that was given nothing but the last weights.
      plain: the same by vLLM alone over `exported`: pairs of token ids and log-probs.
      sampled: groups of the last version.
      exported: a checkpoint of the last version.
    """

    student: cases.Student
    prompts: list[EncodedPrompt]
    gaps: list[list[np.ndarray]]
    greedy: list[list[Completion]]
    builtin: list[list[Completion]]
    fresh: list[Completion]
    plain: list[tuple[list[int], list[float]]]
    sampled: list[Rollout]
    exported: str


@pytest.fixture(scope="module", params=cases.MODELS, ids=lambda m: f"{m[0]}-{'tied' if m[1] else 'untied'}")
def history(request, cluster, tmp_path_factory) -> History:
    kind, tied = request.param
    folder = cases.model(kind, tied)
    plain = ray.remote(cases.PlainVllm).options(num_cpus=1).remote()
    # A mebibyte is several buckets of these models.
    student = cases.Student(cases.config(folder, bucket_mib=1))
    learner, (processor, network) = student.learner, (student.policy.processor, student.policy.network)
    whole = cases.config(folder, bucket_mib=256)
    prompts = [prompt(processor, sizes if kind != "qwen2" else [], i) for i, sizes in enumerate(SIZES)]
    gaps, greedy, builtin = [], [], []
    with (
        open_engines(student.config, processor, network, folder) as engine,
        open_engines(whole, processor, network, folder) as fresh,
    ):
        state = learner.init_state(student.policy.load())
        for version in range(cases.UPDATES + 1):
            engine.load(state.params, version)
            student.policy.sampler.load(state.params, version)
            groups = sample(engine, prompts, 4, SamplingSettings(max_new_tokens=NEW_TOKENS))
            sampled = [Rollout(*pair) for pair in zip(prompts, groups, strict=True)]
            own = student.log_probs(state.params, sampled)
            theirs = [completion.log_probs for rollout in sampled for completion in rollout.completions]
            gaps.append([np.abs(a - b) for a, b in zip(own, theirs, strict=True)])
            greedy.append(likeliest(engine, prompts))
            builtin.append(likeliest(student.policy.sampler, prompts))
            if version < cases.UPDATES:
                engine.release_params()
                student.policy.sampler.release_params()
                state, metrics = learner.update(state, student.pack(cases.rewarded(sampled, seed=version)))
                assert not metrics["skipped_updates"]
        fresh.load(state.params, cases.UPDATES)
        from_fresh = likeliest(fresh, prompts)
    exported = tmp_path_factory.mktemp("exported") / "model"
    export(state.params, folder, exported)
    from_plain = ray.get(plain.greedy.remote(str(exported), *as_plain_vllm_takes_them(prompts, processor)), timeout=300)
    ray.kill(plain)
    return History(student, prompts, gaps, greedy, builtin, from_fresh, from_plain, sampled, exported)


def likeliest(sampler, prompts) -> list[Completion]:
    groups = sample(
        sampler, prompts, 1, SamplingSettings(max_new_tokens=NEW_TOKENS, key=sampling_key(0, 0), temperature=0)
    )
    return [group[0] for group in groups]


def as_plain_vllm_takes_them(prompts, processor):
    from PIL import Image

    given = []
    for encoded in prompts:
        given.append({"prompt_token_ids": cases.short_ids(encoded).tolist()})
        if encoded.images:
            given[-1]["multi_modal_data"] = {"image": [Image.fromarray(p.pixels) for p in encoded.images]}
    allowed = [token for token in range(oracle.VOCABULARY) if token not in processor.banned_ids]
    return given, allowed, list(processor.end_ids), NEW_TOKENS


def assert_same(ours: list[Completion], others) -> None:
    """The same tokens, the others' given as pairs of ids and log-probs. But for one tie, which either may break: where
    the two part, both tokens were as likely."""
    ties = 0
    for completion, (token_ids, log_probs) in zip(ours, others, strict=True):
        mine, theirs = completion.token_ids.tolist(), list(token_ids)
        parts = next((at for at, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), None)
        assert parts is not None or len(mine) == len(theirs)
        ties += parts is not None
        compared = len(mine) if parts is None else parts + 1
        np.testing.assert_allclose(completion.log_probs[:compared], log_probs[:compared], atol=CLOSE)
    assert ties <= 1


def told(completions: list[Completion]):
    """As `assert_same` takes them."""
    return [(completion.token_ids, completion.log_probs) for completion in completions]


def test_learner_and_engine_agree_before_and_after_each_update(history):
    assert len(history.gaps) == cases.UPDATES + 1
    largest = [max(gap.max() for gap in gaps) for gaps in history.gaps]
    print(largest, [np.mean(np.concatenate([c.log_probs for r in history.sampled for c in r.completions]))])
    assert max(largest) < CLOSE, largest
    assert np.mean(np.concatenate([gap for gaps in history.gaps for gap in gaps])) < CLOSE_ON_AVERAGE


def test_each_update_moves_what_the_engine_computes(history):
    for version, completions in enumerate(history.greedy):
        assert all((completion.policy_version == version).all() for completion in completions)
    moved = [
        [abs(float(before.log_probs[0] - after.log_probs[0])) for before, after in zip(older, newer, strict=True)]
        for older, newer in zip(history.greedy, history.greedy[1:], strict=False)
    ]
    print(moved)
    assert min(max(row) for row in moved) > MOVED, moved


def test_greedy_completions_are_the_built_in_samplers(history):
    greedy, builtin = [sum(versions, []) for versions in (history.greedy, history.builtin)]
    assert_same(greedy, told(builtin))
    for ours, theirs in zip(greedy, builtin, strict=True):
        same = np.array_equal(ours.token_ids, theirs.token_ids)
        assert not same or ours.finish_reason == theirs.finish_reason


def test_an_engine_that_is_given_the_last_weights_alone_in_one_bucket_says_the_same(history):
    assert_same(history.greedy[-1], told(history.fresh))


def test_vllms_own_loader_reads_the_exported_checkpoint_and_says_the_same(history):
    assert_same(history.greedy[-1], history.plain)


def test_transformers_reads_the_exported_checkpoint_and_says_the_same(history):
    processor = history.student.policy.processor
    model = oracle.load_model(history.exported)
    others = []
    for encoded in history.prompts:
        vision = vision_arguments(processor, encoded)
        ids = oracle.hf_generate(
            model, encoded.token_ids, max_new_tokens=NEW_TOKENS, suppress=processor.banned_ids, **vision
        )
        others.append((ids, oracle.hf_log_probs(model, encoded.token_ids, ids, banned=processor.banned_ids, **vision)))
    assert_same(history.greedy[-1], others)
    for rollout in history.sampled:
        vision = vision_arguments(processor, rollout.encoded)
        for completion in rollout.completions:
            expected = oracle.hf_log_probs(
                model, rollout.encoded.token_ids, completion.token_ids, banned=processor.banned_ids, **vision
            )
            np.testing.assert_allclose(completion.log_probs, expected, atol=CLOSE)
