"""What a run with vLLM is told before any engine samples: prompts that leave room, an engine that can't be one."""

import json
import sys
import types
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from lmmr1_jax.config.schema import RolloutConfig, TrainConfig, VllmConfig
from lmmr1_jax.data.faults import SkipPrompt
from lmmr1_jax.data.processor import Processor
from lmmr1_jax.rollout.engines.protocol import EngineConfigError, EngineFailed, GroupRequest
from lmmr1_jax.rollout.engines.transport import choose_transport
from lmmr1_jax.rollout.engines.vllm import build as vllm_build
from lmmr1_jax.rollout.engines.vllm.engine import Engine
from lmmr1_jax.rollout.engines.vllm.settings import engine_settings, prompt_limits
from lmmr1_jax.rollout.loaded_model import TINY_MODEL
from lmmr1_jax.rollout.sampler import SamplerLimits, apply_limits
from lmmr1_jax.runtime.errors import UserError
from lmmr1_jax.types.records import Prompt
from weights_bridge.errors import TransportError
from weights_bridge.vllm.plugin import HOST_BACKEND

POSITIONS = json.loads((TINY_MODEL / "config.json").read_text())["max_position_embeddings"]


def test_prompts_leave_a_completion_its_room_in_the_models_positions(caplog):
    config = TrainConfig(rollout=RolloutConfig(sampler="vllm", max_new_tokens=4000))
    processor = Processor(TINY_MODEL, max_prompt_tokens=4096)
    limits = prompt_limits(config, POSITIONS)
    assert engine_settings(config, processor, limits, on_gpu=False, backend="none").max_model_len == POSITIONS
    assert processor.max_prompt_tokens == 4096 and processor.max_images is None
    apply_limits(processor, limits)
    assert processor.max_prompt_tokens == POSITIONS - 4000
    assert "prompts of more than 96 tokens are skipped" in caplog.text
    assert processor.max_images == config.vllm.max_images
    long = Prompt([{"role": "user", "content": "count " * 200}], None, "p", "test", "f", 0)
    with pytest.raises(SkipPrompt, match="the limit is 96"):
        processor.encode(long)


def test_prompts_that_leave_room_are_not_touched(caplog):
    processor = Processor(TINY_MODEL, max_prompt_tokens=1024)
    config = TrainConfig(rollout=RolloutConfig(sampler="vllm", max_new_tokens=POSITIONS - 1024))
    apply_limits(processor, prompt_limits(config, POSITIONS))
    assert processor.max_prompt_tokens == 1024 and not caplog.text


def test_completions_as_long_as_the_model_are_refused():
    config = TrainConfig(rollout=RolloutConfig(sampler="vllm", max_new_tokens=POSITIONS))
    with pytest.raises(UserError, match="max_new_tokens is 4096, but the model has only 4096 positions"):
        prompt_limits(config, POSITIONS)


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        ({"vllm": None}, "can't be imported on .*requirements-sampler.txt"),
        ({"vllm": types.ModuleType("vllm")}, r"vLLM 0\.31\.9 .*too old"),
    ],
    ids=["missing", "too old"],
)
def test_an_engine_without_a_vllm_that_takes_weights_is_unfit(monkeypatch, modules, words):
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
        if module is not None:
            module.__version__ = "0.31.9"
    config = TrainConfig(rollout=RolloutConfig(sampler="vllm"))
    settings = engine_settings(config, Processor(TINY_MODEL), SamplerLimits(), on_gpu=False, backend="none")
    engine = Engine(settings, Path(TINY_MODEL))
    with pytest.raises(EngineConfigError, match=words):
        engine.built.result(timeout=30)
    with pytest.raises(EngineConfigError, match=words):
        engine.initialise({}).result(timeout=30)


@pytest.mark.parametrize("transport", ["nccl", "ipc"])
def test_engines_on_cpus_take_no_weights_by_way_of_gpus(transport):
    with pytest.raises(UserError, match=f"vllm.transport {transport} needs engines on GPUs, and these run on CPUs"):
        choose_transport(VllmConfig(transport=transport), on_gpu=False)


def test_a_learner_without_torch_is_told_that_ipc_needs_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "weights_bridge.transports.ipc", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(TransportError, match="ipc transport needs a torch with CUDA beside JAX"):
        choose_transport(VllmConfig(transport="ipc"), on_gpu=True)


@pytest.mark.parametrize(("backend", "unfit"), [(HOST_BACKEND, True), ("nccl", False)])
def test_only_an_engine_of_another_model_is_unfit_and_not_one_whose_group_broke(monkeypatch, backend, unfit):
    class Refusing:
        def collective_rpc(self, method: str, **_) -> None:
            raise RuntimeError(f"{method} failed")

    monkeypatch.setattr(vllm_build, "build", lambda *_: Refusing())
    config = TrainConfig(rollout=RolloutConfig(sampler="vllm"))
    settings = engine_settings(config, Processor(TINY_MODEL), SamplerLimits(), on_gpu=False, backend=backend)
    engine = Engine(settings, Path(TINY_MODEL))
    with pytest.raises(EngineFailed, match="init_weight_transfer_engine failed") as caught:
        engine.initialise({}).result(timeout=30)
    assert isinstance(caught.value, EngineConfigError) == unfit
    engine.close()


def test_an_engine_that_fails_at_the_start_of_an_update_samples_no_more(monkeypatch):
    vllm, failing = mock.MagicMock(), set()

    def collective_rpc(method: str, **_) -> None:
        if method in failing:
            raise RuntimeError(f"{method} failed")

    vllm.collective_rpc = collective_rpc
    monkeypatch.setattr(vllm_build, "build", lambda *_: vllm)
    config = TrainConfig(rollout=RolloutConfig(sampler="vllm"))
    settings = engine_settings(config, Processor(TINY_MODEL), SamplerLimits(), on_gpu=False, backend=HOST_BACKEND)
    engine = Engine(settings, Path(TINY_MODEL))
    engine.begin_update(in_flight=False).result(timeout=30)
    engine.finish_update(0).result(timeout=30)
    failing.add("start_weight_update")
    with pytest.raises(EngineFailed, match="start_weight_update failed"):
        engine.begin_update(in_flight=False).result(timeout=30)
    ids = np.arange(3, dtype=np.int32)
    waiting = engine.generate(GroupRequest("late", ids, ids, (), 1, 4))
    with pytest.raises(TimeoutError):
        waiting.result(timeout=1.0)
    assert not vllm.add_request.called
    engine.close()
