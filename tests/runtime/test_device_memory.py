"""The memory of a GPU that learner and engines share."""

import os

import pytest

from lmmr1_jax.runtime.device_memory import LEARNER_SHARE, reserve_device_memory

DEPRECATED = "XLA_PYTHON_CLIENT_MEM_FRACTION"


@pytest.fixture
def environment(monkeypatch):
    """Without shares; what is set in it goes with the test."""
    for name in (LEARNER_SHARE, DEPRECATED):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def share() -> str | None:
    return os.environ.get(LEARNER_SHARE)


def test_learner_and_engine_leave_room_for_what_neither_counts(environment):
    reserve_device_memory(True, 0.4)
    # An engine wants its 40 % free when it starts, beside two CUDA contexts of about 0.5 GB, on a GPU of 24 GB too.
    assert float(share()) * 24 + 0.4 * 24 + 2 * 0.5 <= 24
    assert float(share()) > 0.5


@pytest.mark.parametrize("name", [LEARNER_SHARE, DEPRECATED])
def test_a_share_that_the_environment_names_stays(environment, name):
    environment.setenv(name, "0.3")
    reserve_device_memory(True, 0.4)
    assert share() == ("0.3" if name == LEARNER_SHARE else None)


def test_a_learner_that_shares_nothing_is_told_nothing(environment):
    reserve_device_memory(False, 0.4)
    assert share() is None
