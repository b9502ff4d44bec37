"""How often the answers are right: unbiased pass@k, over all prompts and for each source of data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from lmmr1_jax.rollout.sampler import Sampler, SamplingSettings
from lmmr1_jax.types.records import EncodedPrompt, Reward, Rollout

PROMPTS_AT_A_TIME = 256


class Scores(Protocol):
    """What is needed of a verifier (`rewards.rules.service.Verifier`)."""

    def score(
        self, texts: Sequence[str], labels: Sequence[str], prompts: Sequence[str], verifiers: Sequence[str]
    ) -> list[Reward]: ...


@dataclasses.dataclass(frozen=True)
class PromptResult:
    """A prompt's evaluation.

    Attributes:
      data_source: where the prompt comes from.
      completions: how many were judged.
      right: how many of them are right.
      format: share that has the right form.
      tokens: mean length.
      faults: completions that the verifier could not judge; they count as wrong.
    """

    data_source: str
    completions: int
    right: int
    format: float
    tokens: float
    faults: int


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The results of all prompts.

    Attributes:
      n, k: completions per prompt, and k of pass@k.
      prompts: one result per prompt, in order.
    """

    n: int
    k: int
    prompts: tuple[PromptResult, ...]

    @property
    def accuracy(self) -> float:
        """Share of right completions: pass@1; 0 without prompts."""
        return _mean([result.right / result.completions for result in self.prompts])

    @property
    def format(self) -> float:
        """Share of completions of the right form."""
        return _mean([result.format for result in self.prompts])

    @property
    def length(self) -> float:
        """Mean tokens of a completion."""
        return _mean([result.tokens for result in self.prompts])

    @property
    def faults(self) -> int:
        """Completions that the verifier could not judge."""
        return sum(result.faults for result in self.prompts)

    def summary(self) -> dict[str, Any]:
        """What a run keeps of it: fractions, mean tokens, and counts."""
        return {
            "accuracy": self.accuracy,
            "format": self.format,
            "length": self.length,
            "prompts": len(self.prompts),
            "faults": self.faults,
        }

    def report(self) -> dict[str, Any]:
        """The object that `evaluate --out` writes."""
        names = sorted({result.data_source for result in self.prompts})
        sources = {name: self._summary([r for r in self.prompts if r.data_source == name]) for name in names}
        return {"n": self.n, "k": self.k, "overall": self._summary(self.prompts), "sources": sources}

    def _summary(self, results: Sequence[PromptResult]) -> dict[str, Any]:
        return {
            "pass@1": _mean([pass_at_k(r.completions, r.right, 1) for r in results]),
            "pass@k": _mean([pass_at_k(r.completions, r.right, self.k) for r in results]),
            "format": _mean([r.format for r in results]),
            "prompts": len(results),
        }


def pass_at_k(n: int, right: int, k: int) -> float:
    """The unbiased estimate 1 - C(n - right, k) / C(n, k) (Chen et al. 2021, arXiv:2107.03374): the chance that k of
    the n completions, drawn without replacement, hold a right one."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def evaluate(
    sampler: Sampler,
    decode_text: Callable[[Any], str],
    verifier: Scores,
    encoded: Iterable[EncodedPrompt],
    settings: SamplingSettings,
    *,
    n: int = 1,
    k: int = 1,
    prompts_at_a_time: int = PROMPTS_AT_A_TIME,
    check: Callable[[], None] = lambda: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    total: int = 0,
) -> Evaluation:
    """Samples n completions of each prompt and judges them.

    Args:
      decode_text: `Processor.decode`.
      encoded: prompts with labels; taken `prompts_at_a_time`.
      check: called before each of these batches; what it raises ends the evaluation.
      progress: called with how many prompts have been evaluated, of `total`.

    Raises:
      ValueError: k is greater than n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"k must be from 1 to n={n}, not {k}")
    results: list[PromptResult] = []
    for batch in _batches(encoded, prompts_at_a_time):
        check()
        before = len(results)

        def sampling(parts: int, of: int, before: int = before, size: int = len(batch)) -> None:
            progress(before + size * parts // max(of, 1), total)

        sampled = sampler.collect(sampler.submit(batch, n, settings), sampling)
        rollouts = [Rollout(prompt, completions) for prompt, completions in zip(batch, sampled, strict=True)]
        results += score_rollouts(rollouts, decode_text, verifier)
        progress(len(results), total)
    return Evaluation(n, k, tuple(results))


def score_rollouts(
    rollouts: Sequence[Rollout], decode_text: Callable[[Any], str], verifier: Scores
) -> list[PromptResult]:
    """One result per rollout."""
    pairs = [(rollout, completion) for rollout in rollouts for completion in rollout.completions]
    rewards = verifier.score(
        [decode_text(completion.token_ids) for _, completion in pairs],
        [rollout.encoded.prompt.label or "" for rollout, _ in pairs],
        [decode_text(rollout.encoded.token_ids) for rollout, _ in pairs],
        [rollout.encoded.prompt.verifier for rollout, _ in pairs],
    )
    results, at = [], 0
    for rollout in rollouts:
        count = len(rollout.completions)
        own, at = rewards[at : at + count], at + count
        results.append(
            PromptResult(
                data_source=rollout.encoded.prompt.data_source,
                completions=count,
                right=sum(reward.parts["accuracy"] > 0.5 for reward in own),
                format=_mean([reward.parts["format"] for reward in own]),
                tokens=_mean([len(completion.token_ids) for completion in rollout.completions]),
                faults=sum(reward.fault is not None for reward in own),
            )
        )
    return results


def _batches(items: Iterable[EncodedPrompt], size: int) -> Iterator[list[EncodedPrompt]]:
    batch: list[EncodedPrompt] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
