"""Prompts come in the cursor's order whatever the threads do, bad ones are replaced and counted, resuming is exact."""

import itertools
import json
import threading
import time

import numpy as np
import pytest
from waiting import wait_until

from lmmr1_jax.data.faults import ImageFault
from lmmr1_jax.data.prompt_loader import PromptLoader, encode_all
from lmmr1_jax.data.prompt_set import PromptCursor
from lmmr1_jax.data.skips import SkipLog
from lmmr1_jax.runtime.errors import UserError
from lmmr1_jax.types.records import EncodedPrompt, Image, Prompt


class Encoder:
    """Encodes a prompt as its row's number, slowly and out of order; every third row has a broken image."""

    def __init__(self, bad=lambda row: row % 3 == 2, pause=0.002):
        self.bad, self.pause, self.started, self.lock = bad, pause, 0, threading.Lock()

    def encode(self, prompt):
        with self.lock:
            self.started += 1
        time.sleep(self.pause * (prompt.row * 7 % 5))
        if self.bad(prompt.row):
            raise ImageFault("broken_image", f"row {prompt.row}")
        ids = np.asarray([prompt.row], np.int32)
        image = Image(np.zeros((1, 1, 3), np.uint8), (1, 2, 2), animated=prompt.row == 0)
        return EncodedPrompt(prompt, ids, np.zeros((3, 1), np.int32), (image,), np.zeros(0, np.int32), 1)


PROMPTS = [Prompt([], "1", str(i), "made", "made.jsonl", i) for i in range(20)]


def loader(encoder=None, skips=None, **options):
    cursor = PromptCursor(PROMPTS, seed=5)
    return PromptLoader(cursor, encoder or Encoder(), skips or SkipLog(), **options)


def rows(encoded):
    return [e.prompt.row for e in encoded]


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_order_and_skips_do_not_depend_on_the_threads(workers):
    cursor, skips = PromptCursor(PROMPTS, seed=5), SkipLog()
    drawn = [cursor.next().row for _ in range(45)]
    made = loader(skips=skips, workers=workers)
    taken = list(itertools.chain(*(rows(made.take(7)) for _ in range(4))))
    good = [row for row in drawn if row % 3 != 2]
    assert taken == good[:28]
    until = drawn[: [i for i, row in enumerate(drawn) if row % 3 != 2][27] + 1]
    assert [r["row"] for r in skips.records] == [row for row in until if row % 3 == 2]
    assert made.used + skips.total == len(until)
    assert made.animated == taken.count(0)
    made.close()


@pytest.mark.parametrize("workers", [0, 3])
def test_a_resumed_feeder_gives_what_the_first_would_have_given(workers):
    first_skips = SkipLog()
    first = loader(skips=first_skips, workers=workers)
    first.take(9)
    state, before = json.loads(json.dumps(first.state_dict())), len(first_skips.records)
    expected = rows(first.take(30))
    second_skips = SkipLog()
    second = loader(skips=second_skips, workers=workers)
    second.take(3)
    second.load_state_dict(state)
    since = len(second_skips.records)
    assert rows(second.take(30)) == expected
    assert second_skips.records[since:] == first_skips.records[before:]
    assert second.state_dict() == first.state_dict()
    first.close()
    second.close()


def test_no_more_than_so_many_prompts_are_prepared_ahead():
    encoder = Encoder(bad=lambda row: False, pause=0)
    made = loader(encoder, workers=2, ahead=4)
    made.take(3)
    assert wait_until(lambda: encoder.started >= 3 + 4)
    time.sleep(0.2)
    assert encoder.started == 3 + 4
    made.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_prompt_set_without_anything_usable_ends_with_one_line(workers):
    skips = SkipLog()
    made = loader(Encoder(bad=lambda row: True, pause=0), skips, workers=workers)
    with pytest.raises(UserError, match="made.jsonl: a whole pass over the prompts gave none"):
        made.take(1)
    assert skips.total == len(PROMPTS)
    made.close()


def test_an_error_that_is_no_fault_of_the_prompt_is_not_swallowed():
    class Broken:
        def encode(self, prompt):
            raise UserError("the chat template is broken")

    made = loader(Broken(), workers=2)
    with pytest.raises(UserError, match="template"):
        made.take(1)
    made.close()


@pytest.mark.parametrize("workers", [0, 3])
def test_one_pass_gives_every_usable_prompt_once_and_then_ends(workers):
    skips = SkipLog()
    used = rows(encode_all(PROMPTS, Encoder(), skips, workers=workers, ahead=4))
    assert used == [row for row in range(20) if row % 3 != 2]
    assert [r["row"] for r in skips.records] == [row for row in range(20) if row % 3 == 2]


def test_a_pass_that_is_left_early_prepares_no_further():
    encoder = Encoder(bad=lambda row: False, pause=0)
    one_pass = encode_all(PROMPTS, encoder, SkipLog(), workers=1, ahead=4)
    next(one_pass)
    one_pass.close()
    assert encoder.started <= 5
