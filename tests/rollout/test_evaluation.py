"""pass@k and its averages, by hand."""

import math

import numpy as np
import pytest

from lmmr1_jax.rollout.evaluation import evaluate, pass_at_k
from lmmr1_jax.rollout.sampler import SamplingSettings
from lmmr1_jax.types.records import Completion, EncodedPrompt, Prompt, Reward


def test_pass_at_k_is_the_chance_that_a_draw_of_k_holds_a_right_one():
    assert pass_at_k(4, 1, 1) == 0.25 and pass_at_k(4, 1, 2) == 0.5 and pass_at_k(4, 1, 4) == 1
    assert pass_at_k(4, 0, 3) == 0 and pass_at_k(4, 4, 1) == 1 and pass_at_k(4, 2, 3) == 1
    assert math.isclose(pass_at_k(10, 3, 5), 1 - 21 / 252)


class Sampler:
    """Writes the numbers 0, 1, ..., n - 1."""

    def submit(self, prompts, n, settings):
        return prompts, n

    def collect(self, handle, progress):
        encoded, n = handle
        one = lambda i: Completion(np.array([i], np.int32), np.zeros(1, np.float32), "stop", np.zeros(1, np.int32))  # noqa: E731
        return [tuple(one(i) for i in range(n)) for _ in encoded]


class Verifier:
    """A number below the label is right; 3 cannot be judged."""

    def score(self, texts, labels, prompts, verifiers):
        rewards = []
        for text, label in zip(texts, labels, strict=True):
            if text == "3":
                rewards.append(Reward(0.0, {"accuracy": 0.0, "format": 0.0}, "timeout"))
            else:
                rewards.append(Reward(1.0, {"accuracy": float(int(text) < int(label)), "format": 1.0}))
        return rewards


def prompt(label: int, source: str) -> EncodedPrompt:
    ids = np.zeros(1, np.int32)
    return EncodedPrompt(Prompt([], str(label), "0", source, "f", 0), ids, np.zeros((3, 1)), (), np.zeros(0), 1)


def test_a_report_averages_over_prompts_and_sources():
    prompts = [prompt(1, "geometry"), prompt(0, "geometry"), prompt(2, "counting")]
    result = evaluate(
        Sampler(),
        lambda ids: str(ids[0]),
        Verifier(),
        iter(prompts),
        SamplingSettings(max_new_tokens=1),
        n=4,
        k=2,
        prompts_at_a_time=2,
    )
    report = result.report()
    assert (report["n"], report["k"]) == (4, 2)
    counting, geometry = report["sources"]["counting"], report["sources"]["geometry"]
    assert counting == {"pass@1": 0.5, "pass@k": pytest.approx(5 / 6), "format": 0.75, "prompts": 1}
    assert geometry == {"pass@1": 0.125, "pass@k": 0.25, "format": 0.75, "prompts": 2}
    assert report["overall"]["pass@1"] == pytest.approx(0.25) and report["overall"]["prompts"] == 3
    assert result.accuracy == pytest.approx(0.25) and result.faults == 3 and result.length == 1


def test_k_above_n_is_refused():
    with pytest.raises(ValueError, match="k must be"):
        evaluate(Sampler(), str, Verifier(), [], SamplingSettings(max_new_tokens=1), n=2, k=3)


def test_a_stop_ends_an_evaluation_between_batches():
    taken = []

    def check():
        if len(taken) == 2:
            raise InterruptedError

    prompts = (taken.append(None) or prompt(1, "counting") for _ in range(6))
    with pytest.raises(InterruptedError):
        evaluate(
            Sampler(), lambda ids: str(ids[0]), Verifier(), prompts,
            SamplingSettings(max_new_tokens=1), n=4, prompts_at_a_time=1, check=check,
        )  # fmt: skip
    assert len(taken) == 2
