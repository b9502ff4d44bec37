"""Where rewards come from, and how several sources make one reward.

A source is handed the groups of a step and says what each completion earns, its own weights applied. A completion's
reward is the sum over the sources, with the parts of all of them; where one source could not judge it, it earns 0 and
the fault is counted: an objective with a part missing is another objective.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from lmmr1_jax.rewards.rules.service import Verifier
from lmmr1_jax.rewards.workers.pool import WorkerFailure
from lmmr1_jax.runtime.errors import UserError
from lmmr1_jax.types.records import Reward, Rollout

Scored = Callable[[int], None]


def nobody(more: int) -> None:
    """Nobody watches."""


class RewardFailed(UserError):
    """A source could not judge, and the config says to stop then."""


@dataclasses.dataclass(frozen=True)
class Group:
    """A rollout with its texts, decoded when somebody asks for them.

    Attributes:
      rollout: the prompt and its completions.
      decode: `Processor.decode`.
    """

    rollout: Rollout
    decode: Callable[..., str]

    @functools.cached_property
    def texts(self) -> tuple[str, ...]:
        """The completions, special tokens left out."""
        return tuple(self.decode(completion.token_ids) for completion in self.rollout.completions)

    @functools.cached_property
    def raw_texts(self) -> tuple[str, ...]:
        """The completions, special tokens included."""
        return tuple(self.decode(completion.token_ids, special=True) for completion in self.rollout.completions)

    @functools.cached_property
    def raw_prompt(self) -> str:
        """The prompt as the chat template wrote it: special tokens included, one token for an image."""
        text = self.decode(self.rollout.encoded.token_ids, special=True)
        return re.sub(r"(?:<\|image_pad\|>)+", "<|image_pad|>", text)

    @property
    def label(self) -> str:
        """The gold answer; empty where there is none."""
        return self.rollout.encoded.prompt.label or ""


class RewardSource(Protocol):
    """Whoever judges completions: the rules, a function, a server, a reward model.

    Attributes:
      name: what messages call it.
    """

    name: str

    def check(self, group: Group) -> None:
        """Before the first step, with a group such as will come.

        Raises:
          RewardFailed: it can't judge this group.
          UserError: it can't judge any.
        """
        ...

    def score(self, groups: Sequence[Group], scored: Scored = nobody) -> list[list[Reward | WorkerFailure]]:
        """For every completion of every group, what this source adds to its reward, by name, or why it can't tell.

        `scored` may be called with a number of further completions that have been scored, for who watches.

        `Reward.total` has the source's weight applied, `Reward.parts` have not; each part becomes the metric
        `reward/PART`, so its name must be the source's own (`specs.check_names`). A `WorkerFailure` is treated as
        `rewards.on_error` says; a `Reward` with a `fault` of its own is counted and earns 0.
        """
        ...

    def close(self) -> None:
        """Frees what the source holds."""
        ...


@runtime_checkable
class Stateful(Protocol):
    """A source that remembers something between steps, which a resumed run must go on with."""

    name: str

    def state_dict(self) -> dict[str, Any] | None:
        """What it remembers, as JSON can hold it."""
        ...

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Goes back to `state`."""
        ...


class RuleSource:
    """The rules: accuracy and format. Leaves the verifier open: the evaluation uses it too."""

    name = "rules"

    def __init__(self, verifier: Verifier):
        self._verifier = verifier

    def check(self, group: Group) -> None:
        """Nothing: they have read the gold answers."""

    def score(self, groups: Sequence[Group], scored: Scored = nobody) -> list[list[Reward | WorkerFailure]]:
        """`RewardSource.score`."""
        texts = [text for group in groups for text in group.texts]
        every = [group for group in groups for _ in group.texts]
        prompts = None
        if self._verifier.config.variant == "lmm-r1":  # which grades the prompt where a completion is empty
            plain = [group.decode(group.rollout.encoded.token_ids) for group in groups]
            prompts = [text for text, group in zip(plain, groups, strict=True) for _ in group.texts]
        verifiers = [group.rollout.encoded.prompt.verifier for group in every]
        labels = [group.label for group in every]
        rewards = iter(self._verifier.score(texts, labels, prompts, verifiers, on_answer=lambda index: scored(1)))
        return [[next(rewards) for _ in group.texts] for group in groups]

    def close(self) -> None:
        pass


class Rewards:
    """All sources of a run together.

    Attributes:
      sources: asked one after the other.
    """

    def __init__(self, sources: Sequence[RewardSource], decode: Callable[..., str], *, on_error: str):
        """
        Args:
          decode: `Processor.decode`.
          on_error: "stop" or "zero", as `rewards.on_error`.
        """
        self.sources = tuple(sources)
        self._decode, self._on_error = decode, on_error
        self._warnings: list[str] = []
        self._warned: set[str] = set()

    def check(self, rollout: Rollout) -> None:
        """Lets every source judge a rollout that nobody trains on.

        Raises:
          UserError: a source can't be used; where `on_error` is "zero", only if it can never be.
        """
        group = Group(rollout, self._decode)
        for source in self.sources:
            try:
                source.check(group)
            except RewardFailed as error:
                if self._on_error == "stop":
                    raise
                self._warn(str(error))

    def score(
        self, rollouts: Sequence[Rollout], progress: Callable[[int, int], None] = lambda done, total: None
    ) -> list[Rollout]:
        """The same groups with their rewards.

        Args:
          rollouts: groups without rewards.
          progress: called with how many completions have been scored, of how many.

        Raises:
          RewardFailed: a source failed and `on_error` is "stop".
        """
        groups = [Group(rollout, self._decode) for rollout in rollouts]
        results = [self._ask(source, groups, progress) for source in self.sources]
        return [
            dataclasses.replace(rollout, rewards=tuple(map(combine, zip(*theirs, strict=True))))
            for rollout, theirs in zip(rollouts, zip(*results, strict=True), strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        """What the sources remember, by their names."""
        return {source.name: source.state_dict() for source in self.sources if isinstance(source, Stateful)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to `state`."""
        for source in self.sources:
            if isinstance(source, Stateful):
                source.load_state_dict(state.get(source.name))

    def warnings(self) -> list[str]:
        """What has gone wrong since the last call, each kind of it told once in a run."""
        told, self._warnings = self._warnings, []
        return told

    def close(self) -> None:
        """Closes all sources."""
        with contextlib.ExitStack() as stack:
            for source in self.sources:
                stack.callback(source.close)

    def __enter__(self) -> Rewards:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(
        self, source: RewardSource, groups: Sequence[Group], progress: Callable[[int, int], None]
    ) -> list[list[Reward | WorkerFailure]]:
        total = sum(len(group.rollout.completions) for group in groups)
        done = 0

        def scored(more: int) -> None:
            nonlocal done
            done = min(done + more, total)
            progress(done, total)

        results = source.score(groups, scored)
        scored(total)
        if self._on_error == "stop":
            refuse_fault(results)
        for result in (result for group in results for result in group):
            if isinstance(result, WorkerFailure):
                self._warn(result.detail)
        return results

    def _warn(self, detail: str) -> None:
        kind = re.sub(r"\d+|'.*?'", "", detail)  # which prompt it was, and which value, makes no new kind
        if kind not in self._warned:
            self._warned.add(kind)
            self._warnings.append(f"{detail}; the completions concerned earn 0")


def refuse_fault(results: Sequence[Sequence[Reward | WorkerFailure]]) -> None:
    """Raises RewardFailed with the first fault's words where there is one."""
    for result in (result for group in results for result in group):
        if isinstance(result, WorkerFailure):
            raise RewardFailed(result.detail)


def combine(results: Sequence[Reward | WorkerFailure]) -> Reward:
    """One completion's reward from what every source says of it."""
    parts: dict[str, Any] = {}
    fault, total = None, 0.0
    for result in results:
        if isinstance(result, WorkerFailure):
            fault = fault or result.kind
        else:
            fault = fault or result.fault
            total += result.total
            parts |= result.parts
    return Reward(0.0 if fault else total, parts, fault)
