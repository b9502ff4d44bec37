"""Commands over a vLLM engine, as a user gives them: what it can't take costs a line, or ends a run resumably."""

import json
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("vllm")

from PIL import Image  # noqa: E402
from whole_runs import ROOT, lines, train  # noqa: E402

TINY_MODEL = ROOT / "lmmr1_jax" / "assets" / "tiny"


@pytest.fixture
def data(tmp_path):
    """An image; one that is thinner than vLLM would resize when it is cut into patches; two in one prompt."""
    for name, size in (("red", (64, 64)), ("thin", (8200, 41))):
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")
    with open(tmp_path / "prompts.jsonl", "w") as file:
        for names in (["red"], ["thin"], ["red", "red"]):
            content = [*({"type": "image", "image": f"{name}.png"} for name in names), {"type": "text", "text": "How?"}]
            file.write(json.dumps({"message": json.dumps([{"role": "user", "content": content}])}) + "\n")
    return tmp_path / "prompts.jsonl"


def generate(data, name: str, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "lmmr1_jax.generate", "--model", str(TINY_MODEL), "--data", str(data)]
    command += ["--out", str(data.parent / name), "--max-new-tokens", "8", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_generate_says_the_same_by_either_sampler_and_an_error_for_what_an_engine_does_not_take(data):
    for name, flags in (("jax", ["--sampler", "jax"]), ("vllm", ["--sampler", "vllm", "--max-images", "1"])):
        done = generate(data, name, *flags, "--temperature", "0", "--seed", "-1")
        assert done.returncode == 0, done.stderr
    own, engines = lines(data.parent / "jax"), lines(data.parent / "vllm")
    assert engines[2] == {"index": 2, "error": "too_many_images: 2 images, the sampler takes 1"} and len(own) == 3
    for ours, theirs in zip(own[:2], engines[:2], strict=True):
        assert ours["prompt_token_ids"] == theirs["prompt_token_ids"]
        ((one,), (other,)) = ours["completions"], theirs["completions"]
        assert one["token_ids"] == other["token_ids"] and one["finish_reason"] == other["finish_reason"]
        np.testing.assert_allclose(one["logprobs"], other["logprobs"], atol=1e-4)


def test_a_temperature_that_vllm_would_change_is_one_line_before_anything_starts(data):
    done = generate(data, "none", "--sampler", "vllm", "--temperature", "0.001")
    assert done.returncode == 2 and "--temperature is 0.001; with --sampler vllm it must be 0 or from" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_run_whose_prompt_is_refused_ends_with_a_checkpoint_and_says_how_to_go_on(tmp_path):
    done = train(
        tmp_path / "run",
        *"--config configs/demo/rloo_vllm.py --run.steps 2 --rollout.prompts 2 --rollout.completions 2".split(),
        *"--eval.size 0 --vllm.cpus 1 --vllm.max-num-seqs 16 --vllm.kv-cache-gib 0.125".split(),
        *("--vllm.arguments", json.dumps({"limit_mm_per_prompt": {"image": 0}})),
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: vLLM refuses ")
    assert "after step 0; --resume goes on from there" in done.stdout
    assert (tmp_path / "run" / "checkpoints" / "0").is_dir()
