"""Progress is a line a step in a file or a pipe, a bar on a terminal; both show the same figures."""

import io
import re

from rich.console import Console
from waiting import wait_until

from lmmr1_jax.tracking.console import ProgressDisplay, duration, seconds_left

RECORD = {
    "reward/mean": 0.75,
    "reward/accuracy": 0.5,
    "completion/length": 31.24,
    "kl": 0.00123,
    "tokens_per_second": 1234.4,
}


def test_without_a_terminal_every_step_is_one_plain_line():
    out = io.StringIO()
    display = ProgressDisplay(10, console=Console(file=out, soft_wrap=True))
    display.step(1, RECORD)
    display.evaluation(1, {"accuracy": 0.5, "format": 1.0, "prompts": 256})
    display.close()
    step, evaluation = out.getvalue().splitlines()
    assert step.startswith(
        "step 1/10  reward 0.750  accuracy 0.500  length 31.2  KL 0.0012  tokens/s 1,234  "
    ) and step.endswith(" left")
    assert evaluation == "evaluation at step 1: accuracy 0.500, format 1.000 on 256 prompts"


def test_on_a_terminal_the_bar_and_the_figures_are_drawn_and_lines_stay():
    out = io.StringIO()
    display = ProgressDisplay(10, console=Console(file=out, force_terminal=True, width=100))
    display.start()
    display.step(4, RECORD)
    display.say("[a checkpoint was written]")
    display.close()
    drawn = out.getvalue()
    assert "4/10" in drawn and "accuracy 0.500" in drawn and "[a checkpoint was written]" in drawn


def test_within_a_step_the_phase_and_its_count_are_shown_until_the_step_ends():
    out = io.StringIO()
    with ProgressDisplay(10, console=Console(file=out, force_terminal=True, width=100)) as display:
        display.start()
        display.phase("rollout")
        display.progress(12, 32)
        assert re.fullmatch(r"rollout: sampling 12/32, 0:0\d", display.activity())
        display.phase("learn")
        assert re.fullmatch(r"learn: micro-batches learned, 0:0\d", display.activity())  # not the last phase's count
        display.step(1, RECORD)
        assert display.activity() == ""
    drawn = out.getvalue()
    assert drawn.endswith("\x1b[?25h")  # the cursor is back


def test_without_a_terminal_a_long_silence_is_broken_by_a_line():
    out = io.StringIO()
    with ProgressDisplay(10, console=Console(file=out, soft_wrap=True), quiet_seconds=0.05) as display:
        display.start(done=3)
        display.phase("score")
        display.progress(7, 256)
        assert wait_until(lambda: out.getvalue().count("\n") >= 2)
    lines = out.getvalue().splitlines()
    assert re.fullmatch(r"step 4/10  score: completions scored 7/256, 0:0\d", lines[0])
    with ProgressDisplay(10, console=Console(file=(silent := io.StringIO())), quiet_seconds=30) as display:
        display.start()
        display.phase("score")
    assert silent.getvalue() == ""


def test_a_missing_figure_is_left_out():
    out = io.StringIO()
    ProgressDisplay(2, console=Console(file=out)).step(1, {"reward/mean": 1.0, "kl": None})
    assert "reward 1.000" in out.getvalue() and "KL" not in out.getvalue()


def test_time_left_follows_the_last_steps_without_the_first():
    # The first step took a minute of compilation, the others 2 s each.
    assert seconds_left([0.0], 10) is None
    assert seconds_left([0.0, 60.0], 9) == 540.0
    assert seconds_left([0.0, 60.0, 62.0, 64.0], 7) == 14.0
    assert seconds_left([0.0, 60.0], -1) == 0.0


def test_durations_read_as_clocks():
    assert [duration(s) for s in (None, 5, 65.4, 3725)] == ["?", "0:05", "1:05", "1:02:05"]
