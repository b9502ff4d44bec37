"""The rules as a service within the run: rewards of completions, judged in processes that can be killed.

    with Verifier(config.rewards) as verifier:
        rewards = verifier.score(texts, labels)

A completion whose judge hangs or dies earns 0 and says so in `Reward.fault`; no other completion's reward changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lmmr1_jax.config.schema import RewardsConfig
from lmmr1_jax.rewards.rules.assignment import own_verifiers
from lmmr1_jax.rewards.workers.pool import Inbox, StartFailed, WorkerFailure, WorkerPool
from lmmr1_jax.runtime.errors import UserError
from lmmr1_jax.types.records import Reward


class Verifier:
    """A pool of workers that know the rules, as long as the run lives. Calls from several threads take turns.

    Attributes:
      config: variant, weights, time limit per completion in seconds, number of workers.
    """

    def __init__(self, config: RewardsConfig, *, memory_bytes: int = 2 << 30):
        """Starts the workers and returns at once; they import the rules meanwhile, which no time limit counts.

        Args:
          memory_bytes: address space of one worker.
        """
        self.config = config
        self._pool = WorkerPool(
            "lmmr1_jax.rewards.rules.worker_job",
            *own_verifiers(config),
            workers=config.workers,
            timeout=config.timeout,
            memory_bytes=memory_bytes,
        )

    def score(
        self,
        texts: Sequence[str],
        labels: Sequence[str],
        prompts: Sequence[str] | None = None,
        verifiers: Sequence[str] | None = None,
        *,
        on_answer: Callable[[int], None] = lambda index: None,
    ) -> list[Reward]:
        """One reward per completion, in order.

        Args:
          texts: the completions as text.
          labels: the gold answer of each.
          prompts: the prompt of each as text; `lmm-r1` reads it where a completion is empty.
          verifiers: the name of each one's verifier; the config's where it is left out or empty.
          on_answer: called with the index of each completion that has been judged.
        """
        prompts = [""] * len(texts) if prompts is None else prompts
        verifiers = [""] * len(texts) if verifiers is None else verifiers
        tasks = [self.task(*row) for row in zip(texts, labels, prompts, verifiers, strict=True)]
        return [self.reward(answer) for answer in self._pool.run(tasks, on_answer)]

    def parsable(self, labels: Sequence[str], verifiers: Sequence[str] | None = None) -> list[bool]:
        """`rules.gold_is_parsable` for each, within the time limit: an answer that hangs the parser is none.

        Raises:
          UserError: a verifier of the config's own can't be loaded.
        """
        verifiers = [""] * len(labels) if verifiers is None else verifiers
        tasks = [
            ("gold_is_parsable", (label, self.config.variant, name or self.config.verifier))
            for label, name in zip(labels, verifiers, strict=True)
        ]
        try:
            return [answer is True for answer in self._pool.run(tasks)]
        except StartFailed as error:
            if own_verifiers(self.config):
                raise UserError(f"rewards.verifier: {error}") from None
            raise

    def task(self, text: str, label: str, prompt: str = "", verifier: str = "") -> tuple[str, tuple]:
        """What `serve`'s inbox takes for one completion; `reward` reads the answer."""
        return "grade", (text, label, self.config.variant, prompt, verifier or self.config.verifier)

    def reward(self, answer: tuple[float, float] | WorkerFailure) -> Reward:
        """The reward that a worker's answer comes to."""
        if isinstance(answer, WorkerFailure):
            return Reward(0.0, {"accuracy": 0.0, "format": 0.0}, answer.kind)
        accuracy, form = answer
        total = self.config.accuracy_weight * accuracy + self.config.format_weight * form
        return Reward(total, {"accuracy": accuracy, "format": form})

    def serve(self, inbox: Inbox) -> None:
        """`WorkerPool.serve`."""
        self._pool.serve(inbox)

    def pids(self) -> list[int]:
        """Process ids of the workers that are up."""
        return self._pool.pids()

    def close(self) -> None:
        """Ends all workers, busy or not; a call that waits for them in another thread raises RuntimeError."""
        self._pool.close()

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
