"""Real engines that are killed, stopped, cut off in an update: what they were asked for comes all the same, from whole
weights. The likeliest completions of one model are the same whoever samples them: the built-in sampler says what they
must be."""

import contextlib
import os
import signal
import time

import jax
import numpy as np
import psutil
import pytest

pytest.importorskip("vllm")

from lmmr1_jax.config.schema import DataConfig, RolloutConfig, TrainConfig, VllmConfig  # noqa: E402
from lmmr1_jax.rollout.engines.vllm.open import open_engines  # noqa: E402
from lmmr1_jax.rollout.sampler import SamplingSettings, sample  # noqa: E402
from lmmr1_jax.run.policy import assemble_policy  # noqa: E402
from lmmr1_jax.runtime.errors import SamplingFailed  # noqa: E402
from lmmr1_jax.tasks.shapes import shape_prompts  # noqa: E402
from weights_bridge.stream import Piece  # noqa: E402

TOKENS = 48
GREEDY = SamplingSettings(max_new_tokens=TOKENS, temperature=0.0)
VLLM = dict(cpus=1, max_num_seqs=16, kv_cache_gib=0.125, max_images=1, bucket_mib=1, sync_timeout=120.0)


def config(**vllm) -> TrainConfig:
    return TrainConfig(
        data=DataConfig(max_prompt_tokens=256),
        rollout=RolloutConfig(sampler="vllm", max_new_tokens=TOKENS),
        vllm=VllmConfig(**VLLM | vllm),
    )


class Case:
    """Two engines, two versions of the weights, prompts, and what must be sampled from them under each."""

    def __init__(self, sampler, policy):
        self.sampler, self.fleet = sampler, sampler.fleet
        self.prompts = [policy.processor.encode(prompt) for prompt in shape_prompts("train", 96)]
        params = policy.load()
        rng = np.random.default_rng(4)  # no two tokens are nearly as likely anywhere, as they are with 0
        other = jax.tree.map(lambda leaf: leaf * (1 + 0.3 * rng.standard_normal(leaf.shape, np.float32)), params)
        self.weights = [params, other]
        self.expected = []
        for version, weights in enumerate(self.weights):
            policy.sampler.load(weights, version)
            self.expected.append(sample(policy.sampler, self.prompts, 1, GREEDY))
        assert any(
            not np.array_equal(a[0].token_ids, b[0].token_ids) for a, b in zip(*self.expected, strict=True)
        ), "the two versions must differ in what they say"

    def submit(self):
        return self.sampler.submit(self.prompts, 1, GREEDY)

    def check(self, groups, weights: int, version: int) -> None:
        for expected, group in zip(self.expected[weights], groups, strict=True):
            assert np.array_equal(expected[0].token_ids, group[0].token_ids)
            assert (group[0].policy_version == version).all()

    def await_both(self) -> list[int]:
        """Process ids, when both engines have weights."""
        deadline = time.monotonic() + 120
        while len(self.fleet.infos) < 2 and time.monotonic() < deadline:
            sample(self.sampler, self.prompts[:1], 1, GREEDY)
            time.sleep(0.2)
        return [info.pid for info in self.fleet.infos]


@pytest.fixture(scope="module")
def case(cluster):
    policy = assemble_policy(config())
    others = {process.pid for process in engine_processes()}
    with open_engines(config(num_engines=2), policy.processor, policy.network, policy.source) as sampler:
        # The second engine comes late: its process is stopped as soon as it is seen.
        late = await_engines(2, others)[1]
        late.suspend()
        case = Case(sampler, policy)
        sampler.load(case.weights[0], 0)
        case.late = late
        yield case


def engine_processes() -> list[psutil.Process]:
    """The engines' processes below this one, oldest first."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "EngineActor" in "".join(process.cmdline()[:1]):
                found.append(process)
    return sorted(found, key=lambda process: process.create_time())


def await_engines(count: int, others: set[int]) -> list[psutil.Process]:
    """The processes of so many engines, `others` aside."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = [process for process in engine_processes() if process.pid not in others]
        if len(found) >= count:
            return found
        time.sleep(0.05)
    raise AssertionError("no engine's process came")


def test_the_run_begins_without_a_late_engine_which_joins_with_current_weights(case):
    assert len(case.fleet.infos) == 1
    case.check(case.sampler.collect(case.submit()), 0, 0)
    case.late.resume()
    assert len(case.await_both()) == 2
    for group in case.sampler.probe(case.prompts[0], 1, GREEDY):
        assert np.array_equal(group[0].token_ids, case.expected[0][0][0].token_ids[: len(group[0].token_ids)])


def test_a_killed_engine_costs_no_completion_and_is_replaced_by_another_one_with_other_random_numbers(case):
    case.await_both()
    prompt = case.prompts[0]

    def of_each_engine():
        groups = case.sampler.probe(prompt, 8, SamplingSettings(max_new_tokens=16, temperature=2.0))
        return [[completion.token_ids.tolist() for completion in group] for group in groups]

    drawn = of_each_engine()
    pids = {info.pid for info in case.fleet.infos}
    replaced = case.fleet.replaced
    handle = case.submit()
    while handle.missing > 80:  # it has given something, and has been asked for more
        time.sleep(0.01)
    os.kill(case.fleet.infos[1].pid, signal.SIGKILL)
    case.check(case.sampler.collect(handle), 0, 0)
    assert case.fleet.replaced == replaced + 1
    case.await_both()
    assert len(pids & {info.pid for info in case.fleet.infos}) == 1
    drawn += of_each_engine()
    # Four draws of the same prompt under the same weights, one of them by an engine that did not exist before.
    assert all(a != b for at, a in enumerate(drawn) for b in drawn[:at])


def test_an_update_that_is_cut_off_leaves_no_engine_with_half_of_it(case):
    pids = case.await_both()
    case.sampler.release_params()
    stream = case.sampler.stream(case.weights[1])

    class CutOff:
        """The stream, during which an engine dies when it has the first bucket, the first time."""

        specs = stream.specs
        times = 0

        def buckets(self):
            self.times += 1
            for number, bucket in enumerate(stream.buckets()):
                if number == 2 and self.times == 1:
                    os.kill(pids[0], signal.SIGKILL)
                yield bucket

    cut = CutOff()
    case.fleet.load(cut, 1)
    case.check(case.sampler.collect(case.submit()), 1, 1)
    case.await_both()
    assert cut.times >= 2
    case.check(case.sampler.collect(case.submit()), 1, 1)


def test_an_update_that_engines_refuse_is_none_and_the_next_ones_have_the_whole(case):
    case.await_both()
    case.sampler.release_params()
    stream = case.sampler.stream(case.weights[0])

    class Strange:
        """The stream, with a tensor that nobody announced in the middle of it, the first time."""

        specs = stream.specs
        times = 0

        def buckets(self):
            self.times += 1
            for number, bucket in enumerate(stream.buckets()):
                if number == 1 and self.times == 1:
                    yield [Piece("unheard.of", 0, np.zeros(16, np.uint8))]
                yield bucket

    said = []
    case.fleet.dispatcher.log = said.append
    case.fleet.load(Strange(), 2)
    case.check(case.sampler.collect(case.submit()), 0, 2)
    assert len(said) == 2 and all("unheard.of" in line and "\n" not in line for line in said)


def test_what_vllm_refuses_is_said_once_and_at_once(cluster):
    policy = assemble_policy(config())
    for arguments, words in (
        ('{"enforce_eagre": true}', "vllm.arguments: .* no argument 'enforce_eagre'; did you mean enforce_eager"),
        ('{"max_model_len": 100000}', "vLLM refuses its arguments: .*max_model_len"),
    ):
        refused = config(arguments=arguments)
        started = time.monotonic()
        with open_engines(refused, policy.processor, policy.network, policy.source) as sampler:
            with pytest.raises(SamplingFailed, match=words) as caught:
                sampler.load(policy.load(), 0)
        assert "\n" not in str(caught.value) and sampler.fleet.replaced == 0
        assert time.monotonic() - started < 60


