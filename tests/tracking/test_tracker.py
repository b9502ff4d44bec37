"""What a run leaves behind, whatever happens to it: killed, resumed, with a disk or a service that fails."""

import io
import json
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tracking.rollout_samples import group

from lmmr1_jax.config.schema import TrackingConfig, TrainConfig
from lmmr1_jax.runtime.errors import UserError
from lmmr1_jax.tracking.console import ProgressDisplay
from lmmr1_jax.tracking.tracker import Tracker


def config(**tracking) -> TrainConfig:
    return TrainConfig(tracking=TrackingConfig(**{"tensorboard": False, "samples": 1, **tracking}))


def decode(token_ids: np.ndarray) -> str:
    return "".join(chr(97 + token) for token in token_ids)


def start(folder, resume_step=None, total_steps=4, **tracking) -> Tracker:
    display = ProgressDisplay(total_steps, Console(file=io.StringIO()))
    return Tracker(folder, config(**tracking), resume_step, total_steps, decode=decode, display=display)


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics(step: int) -> dict:
    times = {"time/rollout": 2.0, "time/score": 0.5, "time/learn": 1.0, "time/sync": 0.25}
    return {"loss/policy": jnp.float32(0.25), "learning_rate": np.float32(step), **times}


def test_a_step_is_one_line_with_its_figures_and_those_of_its_rollouts(tmp_path):
    tracker = start(tmp_path)
    tracker.log(1, metrics(1), [group()])
    tracker.close()
    (record,) = lines(tmp_path / "metrics.jsonl")
    assert record["step"] == 1 and record["loss/policy"] == 0.25 and record["reward/mean"] == pytest.approx(2 / 3)
    assert record["compiled_programs"] == 0 and record["tracking/failures"] == 0 and record["time/elapsed"] > 0


def test_samples_hold_prompt_completions_and_reward_parts_but_no_pixels(tmp_path):
    tracker = start(tmp_path, samples=2)
    tracker.log(1, {}, [group("a"), group("b"), group("c")])
    tracker.close()
    records = lines(tmp_path / "samples.jsonl")
    assert [record["prompt_id"] for record in records] == ["a", "b"]
    first = records[0]
    assert first["answer"] == "$3$" and first["messages"][1]["content"][0]["text"] == "How many red shapes?"
    assert first["messages"][1]["content"][1]["image"] == "data:image/png;base64,(5022 characters)"
    assert first["completions"][0] == {
        "text": "abcd",
        "tokens": 4,
        "finish_reason": "stop",
        "versions": [0, 0],
        "reward": 1.5,
        "parts": {"accuracy": 1.0, "format": 1.0},
        "fault": None,
    }
    assert first["completions"][2]["fault"] == "timeout"


def test_numbers_that_are_not_finite_are_null_and_the_line_stays_json(tmp_path):
    tracker = start(tmp_path)
    tracker.log(1, {"grad_norm": math.nan, "gap/max": jnp.inf})
    tracker.close()
    (record,) = lines(tmp_path / "metrics.jsonl")
    assert record["grad_norm"] is None and record["gap/max"] is None


def test_resuming_cuts_the_step_files_to_the_checkpoints_step(tmp_path):
    tracker = start(tmp_path)
    tracker.evaluation(0, {"accuracy": 0.4, "format": 1.0, "prompts": 8, "seconds": 3.0})
    for step in (1, 2, 3):
        tracker.log(step, metrics(step), [group(f"step{step}")])
    tracker.evaluation(3, {"accuracy": 0.5, "format": 1.0, "prompts": 8, "seconds": 3.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')  # killed while writing

    resumed = start(tmp_path, resume_step=2)
    assert resumed.evaluations == {0: {"accuracy": 0.4, "format": 1.0, "prompts": 8, "seconds": 3.0}}
    for step in (3, 4):
        resumed.log(step, metrics(step), [group(f"again{step}")])
    resumed.close()
    assert [record["step"] for record in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert [r["prompt_id"] for r in lines(tmp_path / "samples.jsonl")] == ["step1", "step2", "again3", "again4"]
    assert [record["step"] for record in lines(tmp_path / "evaluations.jsonl")] == [0]


def test_the_clock_goes_on_over_a_resume(tmp_path):
    tracker = start(tmp_path)
    elapsed = tracker.log(1, metrics(1))["time/elapsed"]
    resumed = start(tmp_path, resume_step=1)
    assert resumed.log(2, metrics(2))["time/elapsed"] > elapsed
    summary = resumed.finish(skipped={})
    assert summary["seconds"]["rollout"] == 4.0 and summary["seconds"]["sync"] == 0.5


def test_a_run_that_starts_anew_keeps_nothing_of_an_earlier_one(tmp_path):
    tracker = start(tmp_path)
    tracker.evaluation(0, {"accuracy": 0.4, "format": 1.0, "prompts": 8})
    tracker.log(1, metrics(1), [group()])
    tracker.finish(skipped={})
    start(tmp_path).close()
    for name in ("metrics", "samples", "evaluations"):
        assert (tmp_path / f"{name}.jsonl").read_text() == ""
    assert not (tmp_path / "summary.json").exists()


def test_the_summary_holds_the_runs_own_figures(tmp_path):
    tracker = start(tmp_path, total_steps=2)
    tracker.evaluation(0, {"accuracy": 0.4, "format": 0.9, "prompts": 8, "seconds": 3.0})
    tracker.log(1, metrics(1))
    tracker.log(2, metrics(2))
    assert not (tmp_path / "summary.json").exists()
    tracker.evaluation(2, {"accuracy": 0.6, "format": 1.0, "prompts": 8, "seconds": 2.0})
    tracker.finish(skipped={"broken_image": 2, "no_answer": 1}, note="x")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 2
    assert {name: summary["seconds"][name] for name in ("rollout", "score", "learn", "sync", "evaluate")} == {
        "rollout": 4.0,
        "score": 1.0,
        "learn": 2.0,
        "sync": 0.5,
        "evaluate": 5.0,
    }
    assert summary["seconds"]["total"] > 0
    assert summary["evaluation"]["before"] == {"accuracy": 0.4, "format": 0.9, "prompts": 8, "seconds": 3.0}
    assert summary["evaluation"]["after"]["accuracy"] == 0.6
    assert summary["skipped"] == 3 and summary["skipped_by_reason"]["broken_image"] == 2 and summary["note"] == "x"
    assert summary["versions"]["jax"] == jax.__version__ and len(summary["devices"]) == jax.device_count()


def test_programs_compiled_after_the_first_step_are_counted_by_name(tmp_path):
    def compile_anew(size):
        return jax.jit(lambda x: x * 3 + size)(np.ones(size, np.float32)).block_until_ready()

    tracker = start(tmp_path)
    compile_anew(3)
    assert tracker.log(1, {})["compiled_programs"] == 0
    assert tracker.log(2, {})["compiled_programs"] == 0
    compile_anew(4)
    assert tracker.log(3, {})["compiled_programs"] == len(tracker.compiled_names) == 1
    tracker.close()


def test_a_failing_sink_costs_one_warning_and_a_count_but_never_the_run(tmp_path):
    tracker = start(tmp_path)
    (tmp_path / "metrics.jsonl").unlink(missing_ok=True)
    (tmp_path / "metrics.jsonl").mkdir()  # every write to it fails from now on
    with pytest.warns(UserWarning, match="JsonLinesSink failed .*; the run goes on") as caught:
        tracker.log(1, {}, [group()])
        record = tracker.log(2, {}, [group()])
    assert len(caught) == 1 and record["tracking/failures"] == 1 and tracker.failures == 2
    tracker.close()
    assert len(lines(tmp_path / "samples.jsonl")) == 2


def test_a_sink_that_cannot_start_does_not_stop_the_run(tmp_path):
    (tmp_path / "tb").write_text("a file where the event files should go")
    with pytest.warns(UserWarning, match="starting a sink failed"):
        with start(tmp_path, tensorboard=True) as tracker:
            assert tracker.log(1, metrics(1))["tracking/failures"] == 1
    assert len(lines(tmp_path / "metrics.jsonl")) == 1


def test_tensorboard_gets_scalars_texts_and_images_and_hides_lost_steps(tmp_path):
    tracker = start(tmp_path, tensorboard=True, images_every=2)
    for step in (1, 2, 3):
        tracker.log(step, {"loss/policy": step}, [group()])
    tracker.close()
    resumed = start(tmp_path, resume_step=2, tensorboard=True, images_every=2)
    resumed.log(3, {"loss/policy": 30}, [group()])
    resumed.evaluation(3, {"accuracy": 0.5, "format": 1.0, "prompts": 8})
    resumed.close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        events = EventAccumulator(str(tmp_path / "tb"), size_guidance={"images": 0, "scalars": 0}).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss/policy")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert [(e.step, e.value) for e in events.Scalars("evaluation/accuracy")] == [(3, 0.5)]
    images = events.Images("samples/0/image0")
    assert [(e.step, e.width, e.height) for e in images] == [(1, 84, 56), (2, 84, 56)]
    (text, _) = events.Tensors("samples/0/text_summary")
    assert b"How many red shapes?" in text.tensor_proto.string_val[0]
    assert b"accuracy 1, format 1" in text.tensor_proto.string_val[0]


def test_wandb_that_is_not_installed_is_the_users_to_mend(tmp_path):
    try:
        import wandb  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match="pip install 'lmmr1-jax\\[wandb\\]'"):
            start(tmp_path, wandb=True)
    else:
        pytest.skip("wandb is installed here")
