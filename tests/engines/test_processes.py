"""Who imports what: an engine no JAX, the learner neither vLLM nor torch; and engines of several processes."""

import json
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

pytest.importorskip("vllm")

import engine_cases as cases  # noqa: E402
import oracle  # noqa: E402
import ray  # noqa: E402
from image_prompts import SIZES, prompt, vision_arguments  # noqa: E402

from lmmr1_jax.data.processor import Processor  # noqa: E402
from lmmr1_jax.rollout.engines.protocol import GroupRequest  # noqa: E402
from lmmr1_jax.rollout.local.sampler import sampling_key  # noqa: E402
from lmmr1_jax.rollout.sampler import SamplingSettings, sample  # noqa: E402
from weights_bridge.load import load  # noqa: E402

ROOT = Path(__file__).parents[2]

ENGINE = """
import asyncio, json, pickle, sys
from lmmr1_jax.rollout.engines.vllm.actor import EngineActor

with open(sys.argv[1], "rb") as file:
    settings, files, announced, tensors, request = pickle.load(file)

async def arrived():
    return list(tensors.values())

async def live():
    actor = EngineActor(settings, files)
    await actor.built()
    await actor.initialise(announced)
    await actor.begin_update(False)
    await actor.receive([(name, 0) for name in tensors], [arrived()])
    await actor.finish_update(3)
    return await actor.generate(request)

(completion,) = asyncio.run(live())
from weights_bridge.vllm import cpu_compat, loader, plugin, receiver
loaded = sorted({"jax", "jaxlib", "flax", "vllm"} & sys.modules.keys())
print(json.dumps([completion.token_ids.tolist(), loaded]))
"""

LEARNER = """
import json, sys
from lmmr1_jax.config.command_line import parse_train_config
parse_train_config(sys.argv[1:], prog="")  # tyro, once at its start, takes a name in sys.modules for the module
sys.modules["torch"] = None  # to Python, not installed: transformers imports it wherever it is
from lmmr1_jax.train import main

status = main(sys.argv[1:])
loaded = [name for name in ("jax", "ray", "torch", "vllm") if sys.modules.get(name) is not None]
print(json.dumps([status, loaded]))
"""


def last_line(program: str, *arguments: str) -> list:
    run = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=cases.PATIENCE
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_an_engine_starts_takes_weights_and_samples_without_jax(tmp_path):
    folder = cases.model("qwen2_5_vl", True)
    processor = Processor(folder)
    encoded = prompt(processor, SIZES[1], 1)
    sent = cases.stream(folder, load(folder))
    tensors = {name: np.ascontiguousarray(array).reshape(-1).view(np.uint8) for name, array in sent}
    images = tuple(image.pixels for image in encoded.images)
    request = GroupRequest("alone", encoded.token_ids, cases.short_ids(encoded), images, 1, 8, temperature=0.0)
    given = cases.engine_settings(folder), cases.side_files(folder), cases.announcement(folder, sent), tensors, request
    (tmp_path / "parts").write_bytes(pickle.dumps(given))
    token_ids, loaded = last_line(ENGINE, str(tmp_path / "parts"))
    assert loaded == ["vllm"]
    assert token_ids == oracle.hf_generate(
        oracle.load_model(folder),
        encoded.token_ids,
        max_new_tokens=8,
        suppress=processor.banned_ids,
        **vision_arguments(processor, encoded),
    )


def test_a_run_with_vllm_imports_no_vllm_and_needs_no_torch_beside_the_learner(tmp_path):
    flags = (
        "--config configs/demo/rloo_vllm.py --run.steps 1 --rollout.prompts 2 --rollout.completions 2 --eval.size 1 "
        "--vllm.cpus 1 --vllm.max-num-seqs 16 --vllm.kv-cache-gib 0.1 --run.dir"
    ).split()
    status, loaded = last_line(LEARNER, *flags, str(tmp_path / "run"))
    assert (status, loaded) == (0, ["jax", "ray"])
    (record,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert record["gap/max"] < 1e-3


def test_workers_that_are_processes_of_their_own_read_the_weights_from_the_object_store_and_end_with_their_engine(
    student, engine
):
    live = cases.LiveEngine(engine.folder, tensor_parallel=2)
    process = psutil.Process(live.ask("built").pid)
    workers = process.children(recursive=True)
    assert len(workers) >= 2
    live.ask("initialise", live.announcement())
    params = cases.noisy(student.policy.load(), 0.3)
    live.sync(load(live.folder))
    live.sync(params, bucket_bytes=1 << 20)
    student.policy.sampler.load(params, 1)
    prompts = [prompt(student.policy.processor, sizes, number) for number, sizes in enumerate(SIZES)]
    expected = sample(
        student.policy.sampler, prompts, 1, SamplingSettings(max_new_tokens=12, key=sampling_key(0, 0), temperature=0)
    )
    for encoded, (builtin,) in zip(prompts, expected, strict=True):
        (completion,) = live.sample(encoded, 1, 12, temperature=0).completions
        assert completion.token_ids.tolist() == builtin.token_ids.tolist()
        np.testing.assert_allclose(completion.log_probs, builtin.log_probs, atol=1e-4)
    ray.kill(live.handle)
    deadline = time.monotonic() + 30
    while any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers):
        assert time.monotonic() < deadline, workers
        time.sleep(0.2)
