"""A Ray cluster for all tests of engines, and one engine for those that ask no more of it than to follow a learner."""

import os
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="package")
def cluster():
    """Ray, connected; its processes find the tests' own modules. What it started ends with these tests."""
    pytest.importorskip("vllm")
    from lmmr1_jax.config.schema import RayConfig
    from lmmr1_jax.rollout.engines.ray_cluster import connected

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")])))
        patch.setenv("RAY_worker_niceness", "0")  # else whatever is busy beside the tests starves engines
        with connected(RayConfig(), cpus=16):
            yield


@pytest.fixture(scope="package")
def engine(cluster):
    """An engine with a Qwen2.5-VL whose head is its own; it has no weights until a test syncs it."""
    import engine_cases as cases

    live = cases.LiveEngine(cases.model("qwen2_5_vl", False))
    live.ask("built")
    live.ask("initialise", live.announcement())
    return live


@pytest.fixture(scope="package")
def student(engine):
    """The learner of the engine's model."""
    import engine_cases as cases

    return cases.Student(cases.config(engine.folder))
