"""An engine that can't have the learner's weights, or has not all of them, says so in a line and samples nothing."""

import numpy as np
import pytest

pytest.importorskip("vllm")

import engine_cases as cases  # noqa: E402
import ray  # noqa: E402
from image_prompts import prompt  # noqa: E402

from lmmr1_jax.data.processor import Processor  # noqa: E402
from lmmr1_jax.rollout.engines.fleet import Fleet, FleetSettings  # noqa: E402
from lmmr1_jax.rollout.engines.protocol import EngineFailed  # noqa: E402
from lmmr1_jax.runtime.errors import UserError  # noqa: E402
from weights_bridge.load import load  # noqa: E402
from weights_bridge.transports.host import HostTransport  # noqa: E402


@pytest.fixture(scope="module")
def stranger(cluster):
    live = cases.LiveEngine(cases.model("qwen2", False))
    live.ask("built")
    return live


@pytest.fixture(scope="module")
def encoded(stranger):
    return prompt(Processor(stranger.folder), [], 0)


def refusal(engine, method, *arguments) -> str:
    with pytest.raises(EngineFailed) as caught:
        engine.ask(method, *arguments)
    line = str(caught.value.cause)
    assert line and "\n" not in line
    return line


def as_bytes(array) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "qwen2_vl"),
        ("vocab_size", 640),
        ("hidden_size", 64),
        ("num_hidden_layers", 4),
        ("tie_word_embeddings", True),
    ],
)
def test_a_learner_of_another_model_is_refused_with_the_field_and_both_values(stranger, encoded, field, value):
    announced = stranger.announcement()
    own = announced["model"][field]
    line = refusal(stranger, "initialise", announced | {"model": announced["model"] | {field: value}})
    assert field in line and repr(value) in line and repr(own) in line
    assert not cases.finished(stranger.begin(encoded, 1, 4), 0.5)


def test_a_learner_that_sends_another_dtype_is_refused_with_both(stranger, encoded):
    announced = stranger.announcement()
    announced["tensors"] = {name: ["bfloat16", shape] for name, (_, shape) in announced["tensors"].items()}
    line = refusal(stranger, "initialise", announced)
    assert "bfloat16" in line and "float32" in line
    assert not cases.finished(stranger.begin(encoded, 1, 4), 0.5)


def test_an_update_that_is_not_whole_is_refused_and_leaves_an_engine_that_samples_nothing(stranger, encoded):
    stranger.ask("initialise", stranger.announcement())
    stranger.ask("begin_update", False)
    *most, (last, array) = stranger.stream(load(stranger.folder))
    assert "model.stranger" in refusal(stranger, "receive", [("model.stranger", 0)], [ray.put([as_bytes(array)])])
    refusal(stranger, "finish_update", 7)
    assert not cases.finished(stranger.begin(encoded, 1, 4), 0.5)
    stranger.ask("begin_update", False)
    stranger.ask("receive", [(name, 0) for name, _ in most], [ray.put([as_bytes(array) for _, array in most])])
    line = refusal(stranger, "finish_update", 7)
    assert "lacks 1 tensor" in line and last in line
    assert not cases.finished(stranger.begin(encoded, 1, 4), 0.5)


def test_a_fleet_whose_engines_have_another_model_ends_with_the_reason(cluster):
    live = cases.LiveEngine(cases.model("qwen2", True))
    announced = live.announcement()
    fleet = Fleet(
        FleetSettings(
            engines=1, max_num_seqs=8, start_timeout=100.0, sync_timeout=100.0, request_timeout=100.0, restarts=0
        ),
        lambda slot, made_before: live.handle,
        HostTransport(bucket_bytes=1 << 20),
        announced | {"model": announced["model"] | {"vocab_size": 640}},
        log=lambda line: None,
    )
    try:
        with pytest.raises(UserError) as caught:
            fleet.load(live.stream(load(live.folder), 1 << 20), 0)
    finally:
        fleet.close()
    line = str(caught.value)
    assert "\n" not in line and "the learner's vocab_size is 640, the engine's model has 512" in line
