"""What a config says of its sampler is checked before anything is loaded, by the sampler that it names."""

import subprocess
import sys

import pytest

from lmmr1_jax.config.command_line import parse_train_config
from lmmr1_jax.rollout.sampler_registry import check_sampler
from lmmr1_jax.runtime.errors import UserError


def check(*flags: str) -> None:
    check_sampler(parse_train_config([*flags]))


def test_an_unknown_sampler_is_refused_with_the_known_names():
    with pytest.raises(UserError, match="rollout.sampler is 'vlm'; it must be one of jax, vllm; did you mean vllm"):
        check("--rollout.sampler", "vlm")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--vllm.num-engines 2", "vllm.num_engines is set, but rollout.sampler is jax, which does not read it"),
        ("--ray.address auto", "ray.address is set, but rollout.sampler is jax"),
        ("--rollout.staleness 1", "the built-in sampler shares the learner's devices"),
        ("--rollout.sampler vllm --rollout.staleness 1 --vllm.colocate", "rollout.staleness must be 0"),
        ("--rollout.sampler vllm --vllm.colocate", "vllm.gpu_memory_utilization .* is too much"),
        ("--rollout.sampler vllm --vllm.label gpu", "it must be NAME=VALUE"),
    ],
)
def test_what_a_sampler_does_not_read_or_can_not_do_is_refused(flags, words):
    with pytest.raises(UserError, match=words):
        check(*flags.split())


def test_a_wrong_sampler_is_one_line_and_status_2_before_jax_is_imported(tmp_path):
    code = (
        "import sys; from lmmr1_jax.runtime.cli import run_cli; from lmmr1_jax.train import main\n"
        "try: run_cli(main)\n"
        "finally: assert 'jax' not in sys.modules"
    )
    command = [sys.executable, "-c", code, "--rollout.sampler", "vlm", "--run.dir", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: rollout.sampler is 'vlm'"), done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("{", "is no JSON"),
        ("[]", "must be a JSON object"),
        ('{"logits_processors": []}', "logits_processors"),
        ('{"max_num_batched_tokens": 64, "logprobs_mode": "raw_logprobs"}', "logprobs_mode"),
        ('{"trust_remote_code": true}', "trust_remote_code"),
    ],
)
def test_vllms_arguments_cannot_change_what_is_sampled_or_run(arguments, words):
    with pytest.raises(UserError, match=f"^vllm.arguments .*{words}"):
        check("--rollout.sampler", "vllm", "--vllm.arguments", arguments)
    check("--rollout.sampler", "vllm", "--vllm.arguments", '{"max_num_batched_tokens": 64}')


@pytest.mark.parametrize("temperature", ["0.005", "2.5"])
def test_a_temperature_that_vllm_would_change_or_refuse_is_refused_for_vllm_alone(temperature):
    with pytest.raises(UserError, match="with rollout.sampler vllm it must be from 0.01 to 2"):
        check("--rollout.sampler", "vllm", "--rollout.temperature", temperature)
    check("--rollout.temperature", temperature)
