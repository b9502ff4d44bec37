"""The sampler over engines asks them for nothing before they have weights."""

from types import SimpleNamespace

import pytest

from lmmr1_jax.rollout.engines.sampler import VllmSampler
from lmmr1_jax.rollout.sampler import SamplerLimits, SamplingSettings, sample


class Fleet:
    """Keeps what it is called with."""

    def __init__(self):
        self.calls = []

    def load(self, stream, version, *, in_flight):
        self.calls.append("load")

    def sleep(self):
        self.calls.append("sleep")

    def submit(self, requests):
        self.calls.append("submit")

    def collect(self, handle, progress):
        return []


def test_sampling_without_weights_is_an_error_and_no_endless_wait():
    sampler = VllmSampler(Fleet(), lambda params: params, SimpleNamespace(sleeps=True), 1, SamplerLimits())
    settings = SamplingSettings(max_new_tokens=1)
    with pytest.raises(RuntimeError, match="no weights"):
        sample(sampler, [], 1, settings)
    sampler.load({}, 0)
    assert sample(sampler, [], 1, settings) == []
    sampler.sleep()
    with pytest.raises(RuntimeError, match="again after they slept"):
        sampler.submit([], 1, settings)
    sampler.load({}, 1)
    sample(sampler, [], 1, settings)
    assert sampler.fleet.calls == ["load", "submit", "sleep", "load", "submit"]
