"""Batches that are begun ahead: in order, never older than was asked for, and a run that ends at any moment goes on
with the very prompts, and the very list of skipped ones, that it would have had."""

import json

import numpy as np
import pytest

from lmmr1_jax.data.faults import SkipPrompt
from lmmr1_jax.data.prompt_loader import PromptLoader
from lmmr1_jax.data.prompt_set import PromptCursor
from lmmr1_jax.data.skips import SkipLog
from lmmr1_jax.rollout.rollout_queue import RolloutQueue
from lmmr1_jax.types.records import EncodedPrompt, Prompt

PROMPTS = [Prompt([], "1", str(row), "made", "made.jsonl", row) for row in range(23)]
BATCHES, SIZE = 12, 3


class Stopped(Exception):
    pass


class Encoder:
    """Every fourth prompt can't be used."""

    def encode(self, prompt):
        if prompt.row % 4 == 1:
            raise SkipPrompt("broken_image", f"row {prompt.row}")
        return EncodedPrompt(prompt, np.zeros(1, np.int32), np.zeros((3, 1), np.int32), (), np.zeros(0, np.int32), 1)


class Run:
    """A run's data, as `train` has it: `done` is what the weights have seen when something is begun."""

    def __init__(self, folder, staleness: int, state=None):
        self.skips = SkipLog(folder / "skipped.jsonl", keep=state is not None)
        self.loader = PromptLoader(PromptCursor(PROMPTS, seed=3), Encoder(), self.skips, workers=2)
        self.begun, self.done, self.stops = [], 0, False
        self.batches = RolloutQueue(
            self.loader, self.skips, self.begin, prompts=SIZE, staleness=staleness, batches=BATCHES
        )
        if state is not None:
            self.done = state["done"]
            self.batches.load_state_dict(state["batches"])

    def begin(self, prompts, number):
        self.begun.append((number, self.done))

        def collect():
            if self.stops:
                raise Stopped
            return [prompt.prompt.row for prompt in prompts]

        return collect

    def state_dict(self):
        return json.loads(json.dumps({"done": self.done, "batches": self.batches.state_dict()}))

    def step(self):
        rows = self.batches.next(self.done)
        self.done += 1
        return rows

    def close(self):
        self.loader.close()
        self.skips.close()


@pytest.mark.parametrize("staleness", [0, 1, 2, 20])
def test_batches_are_begun_as_early_as_was_asked_for_and_no_earlier(tmp_path, staleness):
    run = Run(tmp_path, staleness)
    for _ in range(BATCHES):
        run.step()
    assert [number for number, _ in run.begun] == list(range(BATCHES))
    assert all(done == max(0, number - staleness) for number, done in run.begun)
    run.close()


@pytest.mark.parametrize("staleness", [0, 1, 2])
@pytest.mark.parametrize("way", ["killed", "stopped while it waits"])
def test_a_run_that_ends_anywhere_goes_on_with_what_it_would_have_had(tmp_path, staleness, way):
    whole = Run(tmp_path, 0)
    expected = [whole.step() for _ in range(BATCHES)]
    whole.close()
    skipped = (tmp_path / "skipped.jsonl").read_bytes()
    for at in range(BATCHES):
        folder = tmp_path / f"{way}-{at}"
        run = Run(folder, staleness)
        seen = [run.step() for _ in range(at)]
        state = run.state_dict()
        if way == "killed":  # a step later, of which nothing was saved
            run.step()
        else:
            run.stops = True
            with pytest.raises(Stopped):
                run.step()
            assert run.state_dict() == state
        run.close()
        resumed = Run(folder, staleness, state)
        seen += [resumed.step() for _ in range(BATCHES - at)]
        assert seen == expected
        assert resumed.begun[0] == (at, at)  # by the weights that it has
        resumed.close()
        assert (folder / "skipped.jsonl").read_bytes() == skipped
