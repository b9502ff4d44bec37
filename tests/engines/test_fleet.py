"""The fleet's accounts, with engines that are real processes on Ray and need no vLLM: whatever becomes of them, each
group comes once, whole, in its place, and from the weights that it should come from."""

import dataclasses
import os
import random
import signal
import threading
import time

import numpy as np
import psutil
import pytest

pytest.importorskip("ray")

import ray  # noqa: E402
from small_engine import SmallEngine  # noqa: E402
from waiting import wait_until  # noqa: E402

from lmmr1_jax.rollout.engines.fleet import Fleet, FleetSettings  # noqa: E402
from lmmr1_jax.rollout.engines.protocol import GroupRequest  # noqa: E402
from lmmr1_jax.rollout.engines.ray_cluster import reserved  # noqa: E402
from lmmr1_jax.rollout.engines.requests import MOST_ATTEMPTS  # noqa: E402
from lmmr1_jax.runtime.errors import SamplingFailed  # noqa: E402
from weights_bridge.stream import Piece, TensorSpec  # noqa: E402
from weights_bridge.transports.host import HostTransport  # noqa: E402

PATIENT = FleetSettings(
    engines=2, max_num_seqs=8, start_timeout=60.0, sync_timeout=60.0, request_timeout=60.0, restarts=3
)
QUICK = 3.0
"""Seconds for what must time out, on a machine that may be busy."""


class ThreeBuckets:
    """What the transport needs of a stream."""

    specs = tuple(TensorSpec(name, np.dtype(np.float32), (4,)) for name in "abc")

    def buckets(self):
        for spec in self.specs:
            yield [Piece(spec.name, 0, np.zeros(spec.nbytes, np.uint8))]


@pytest.fixture
def fleets(cluster):
    """Makes fleets, with a fault for each engine by slot and how many were made there before; closes them."""
    made = []

    def fleet(faults=None, settings=PATIENT, make=None, check=lambda: None, **bounds) -> Fleet:
        settings = dataclasses.replace(settings, **bounds)
        said = []

        def make_engine(slot: int, before: int):
            actor = ray.remote(SmallEngine).options(num_cpus=0, max_concurrency=1000)
            return actor.remote((faults or {}).get((slot, before), ""))

        transport = HostTransport(bucket_bytes=1, timeout=settings.sync_timeout, check=check)
        made.append(Fleet(settings, make or make_engine, transport, {}, log=said.append, check=check))
        made[-1].said = said
        return made[-1]

    yield fleet
    for one in made:
        one.close()


def requests(count: int, tokens: int = 20, prefix: str = "p", completions: int = 2) -> list[GroupRequest]:
    ids = np.arange(3, dtype=np.int32)
    return [GroupRequest(f"{prefix}{number}", ids, ids, (), completions, tokens) for number in range(count)]


def assert_whole(asked: list[GroupRequest], groups, version: int) -> None:
    """Each group there once, in order, of one version."""
    for request, group in zip(asked, groups, strict=True):
        texts = [bytes(completion.token_ids.astype(np.uint8)).decode() for completion in group]
        assert texts == [f"{request.name}/{number}" for number in range(request.completions)]
        assert all((completion.policy_version == version).all() for completion in group)


def await_engines(fleet: Fleet, count: int) -> None:
    """Until so many have weights."""
    deadline = time.monotonic() + 60
    while len(fleet.infos) < count and time.monotonic() < deadline:
        fleet.collect(fleet.submit(requests(1, tokens=1, prefix=f"wait-{time.monotonic()}-")))
        time.sleep(0.05)
    assert len(fleet.infos) == count


def test_groups_come_whole_and_once_while_engines_are_killed_again_and_again(fleets):
    fleet = fleets(engines=3, restarts=1000)
    fleet.load(ThreeBuckets(), 0)
    await_engines(fleet, 3)
    rng = random.Random(0)
    killed: list[int] = []
    for version in (0, 1, 2):
        asked = requests(40, tokens=150, prefix=f"v{version}-")
        handle = fleet.submit(asked)
        ended = threading.Event()

        def kill_some(handle=handle, ended=ended) -> None:
            # One more, and the same group could have been there each time and be blamed for it.
            left = [30, 20, 10][: MOST_ATTEMPTS - 1]
            while left and not ended.wait(0.005):
                alive = [info.pid for info in fleet.infos if info.pid not in killed]
                if handle.missing <= left[0] and alive:
                    killed.append(rng.choice(alive))
                    os.kill(killed[-1], signal.SIGKILL)
                    left.pop(0)

        killer = threading.Thread(target=kill_some)
        killer.start()
        groups = fleet.collect(handle)
        ended.set()
        killer.join()
        assert_whole(asked, groups, version)
        fleet.release_params()
        fleet.load(ThreeBuckets(), version + 1)
    assert len(killed) == 3 * (MOST_ATTEMPTS - 1) == fleet.replaced


def test_progress_counts_the_groups_that_came(fleets):
    fleet = fleets(engines=1, max_num_seqs=2)
    fleet.load(ThreeBuckets(), 0)
    told = []
    fleet.collect(fleet.submit(requests(4)), lambda done, of: told.append((done, of)))
    assert told == sorted(set(told)) and told[-1] == (4, 4) and {of for _, of in told} == {4}


def test_a_request_that_kills_engines_is_blamed_and_no_other(fleets):
    fleet = fleets(restarts=100)
    fleet.load(ThreeBuckets(), 0)
    fair = fleet.submit(requests(12, tokens=300))
    poisoned = fleet.submit(requests(1, prefix="poison"))
    with pytest.raises(SamplingFailed, match=f"{MOST_ATTEMPTS} vLLM engines failed while they sampled from poison0"):
        fleet.collect(poisoned)
    assert_whole(requests(12), fleet.collect(fair), 0)
    assert fleet.replaced == MOST_ATTEMPTS


def test_an_engine_that_dies_at_a_probe_is_replaced_and_the_next_one_is_asked(fleets):
    fleet = fleets({(0, 0): "mortal"}, engines=1)
    fleet.load(ThreeBuckets(), 0)
    (fatal,) = requests(1, prefix="fatal")
    ((one, other),) = fleet.probe(fatal)
    assert bytes(one.token_ids.astype(np.uint8)).startswith(b"fatal0@0") and other.policy_version[0] == 0
    assert fleet.replaced == 1


def test_a_probe_that_kills_every_engine_ends_and_says_why(fleets):
    fleet = fleets(restarts=1)
    fleet.load(ThreeBuckets(), 0)
    with pytest.raises(SamplingFailed, match="no vLLM engine is left: its process died"):
        fleet.probe(requests(1, prefix="poison")[0])


def test_a_refused_request_fails_its_own_handle_alone(fleets):
    fleet = fleets(engines=1)
    fleet.load(ThreeBuckets(), 0)
    refused = fleet.submit([*requests(4), *requests(1, prefix="refused")])
    fair = fleet.submit(requests(4, prefix="fair"))
    with pytest.raises(SamplingFailed, match="vLLM refuses refused0"):
        fleet.collect(refused)
    assert_whole(requests(4, prefix="fair"), fleet.collect(fair), 0)
    assert fleet.replaced == 0 and not fleet.said
    with pytest.raises(SamplingFailed, match="vLLM refuses refused0"):
        fleet.probe(requests(1, prefix="refused")[0])


def test_an_engine_that_hangs_is_replaced_and_its_process_ends(fleets):
    fleet = fleets(request_timeout=QUICK)
    fleet.load(ThreeBuckets(), 0)
    await_engines(fleet, 2)
    # The other one answers all the while: many short groups, of which none must be what keeps the watch waiting.
    asked = requests(300, tokens=200)
    handle = fleet.submit(asked)
    hanging = fleet.infos[0].pid
    os.kill(hanging, signal.SIGSTOP)
    assert_whole(asked, fleet.collect(handle), 0)
    assert fleet.replaced == 1 and "vllm.request_timeout" in fleet.said[0]
    assert gone(hanging)


def test_a_late_engine_joins_with_the_current_weights(fleets, tmp_path):
    fleet = fleets({(1, 0): f"late {tmp_path / 'now'}"})
    fleet.load(ThreeBuckets(), 0)
    assert len(fleet.infos) == 1
    assert_whole(requests(4), fleet.collect(fleet.submit(requests(4))), 0)
    fleet.release_params()
    fleet.load(ThreeBuckets(), 7)
    (tmp_path / "now").touch()
    await_engines(fleet, 2)
    asked = requests(8, tokens=100)
    assert_whole(asked, fleet.collect(fleet.submit(asked)), 7)
    assert len(fleet.probe(requests(1)[0])) == 2


@pytest.mark.parametrize("fault", ["raises", "dies", "hangs"])
def test_a_sync_that_breaks_in_the_middle_costs_one_engine_and_no_group(fleets, fault):
    fleet = fleets({(0, 0): fault}, sync_timeout=QUICK)
    fleet.load(ThreeBuckets(), 0)
    await_engines(fleet, 2)
    asked = requests(8)
    assert_whole(asked, fleet.collect(fleet.submit(asked)), 0)
    assert fleet.replaced == 1 and len(fleet.said) == 1
    assert {"raises": "no room for this bucket", "dies": "process died", "hangs": "does not answer"}[fault] in (
        fleet.said[0]
    )


def test_engines_sample_ahead_across_a_sync_and_each_token_knows_its_weights(fleets):
    for in_flight in (True, False):
        fleet = fleets()
        fleet.load(ThreeBuckets(), 0)
        await_engines(fleet, 2)
        asked = requests(8, tokens=2000)
        handle = fleet.submit(asked)
        time.sleep(0.2)
        os.kill(fleet.infos[0].pid, signal.SIGKILL)
        fleet.release_params()
        fleet.load(ThreeBuckets(), 1, in_flight=in_flight)
        groups = fleet.collect(handle)
        versions = [set(completion.policy_version.tolist()) for group in groups for completion in group]
        assert all(seen <= {0, 1} for seen in versions) and {1} in versions
        assert in_flight == ({0, 1} in versions)


def test_engines_that_slept_get_weights_before_they_sample_again(fleets):
    fleet = fleets()
    fleet.load(ThreeBuckets(), 0)
    await_engines(fleet, 2)
    fleet.sleep()
    assert not fleet.infos
    asked = requests(4)
    assert_whole(asked, fleet.collect(fleet.submit(asked)), 0)
    fleet.sleep()
    fleet.release_params()
    handle = fleet.submit(asked)
    fleet.load(ThreeBuckets(), 1)
    assert_whole(asked, fleet.collect(handle), 1)
    assert fleet.replaced == 0


def test_other_weights_of_the_same_version_are_refused_and_not_silently_kept_back(fleets):
    fleet = fleets()
    fleet.load(ThreeBuckets(), 3)
    with pytest.raises(ValueError, match="version 3 of the weights is loaded already"):
        fleet.load(ThreeBuckets(), 3)


def test_what_cannot_be_built_is_given_up_at_once_and_the_others_go_on(fleets):
    fleet = fleets({(0, 0): "unfit"})
    fleet.load(ThreeBuckets(), 0)
    asked = requests(6)
    assert_whole(asked, fleet.collect(fleet.submit(asked)), 0)
    assert wait_until(lambda: fleet.said, 60)
    assert fleet.said == ["vLLM engine 0 is given up: no engine of this kind"] and fleet.replaced == 0
    hopeless = fleets({(0, 0): "unfit", (1, 0): "unfit"})
    with pytest.raises(SamplingFailed, match="no vLLM engine is left: no engine of this kind$"):
        hopeless.load(ThreeBuckets(), 0)


def test_what_fails_twice_in_the_same_words_before_it_is_built_is_given_up(fleets):
    fleet = fleets({(0, before): "stillborn" for before in range(9)}, engines=1, restarts=9)
    with pytest.raises(SamplingFailed, match="no vLLM engine is left: no room for a model$"):
        fleet.load(ThreeBuckets(), 0)
    assert fleet.said == ["vLLM engine 0 is replaced: no room for a model"]


def test_engines_that_never_come_are_waited_for_so_long_and_no_longer(fleets):
    started = time.monotonic()
    fleet = fleets({(0, 0): "never", (1, 0): "never"}, start_timeout=1.0)
    with pytest.raises(SamplingFailed, match="vllm.start_timeout, 1 s"):
        fleet.load(ThreeBuckets(), 0)
    assert time.monotonic() - started < 20


def test_an_engine_that_does_not_come_is_missed_aloud_once_and_the_others_go_on(fleets, tmp_path):
    fleet = fleets({(1, 0): f"late {tmp_path / 'now'}"})
    fleet.load(ThreeBuckets(), 0)
    # Not for the first engine, which may take its time.
    fleet.dispatcher.settings = dataclasses.replace(PATIENT, start_timeout=1.0)
    asked = requests(6)
    deadline = time.monotonic() + 60
    while not fleet.said and time.monotonic() < deadline:
        assert_whole(asked, fleet.collect(fleet.submit(asked)), 0)
    time.sleep(2.5)  # two more looks
    assert fleet.said == ["vLLM engine 1 has not come within vllm.start_timeout, 1 s"] and fleet.replaced == 0
    (tmp_path / "now").touch()
    await_engines(fleet, 2)


def test_a_place_whose_engines_keep_dying_is_given_up(fleets):
    fleet = fleets({(0, before): "dies" for before in range(9)}, restarts=2)
    fleet.load(ThreeBuckets(), 0)
    deadline = time.monotonic() + 60
    while len(fleet.said) < 3 and time.monotonic() < deadline:
        fleet.collect(fleet.submit(requests(1, prefix=f"{time.monotonic()}-")))
    assert fleet.replaced == 2 and "vLLM engine 0" in fleet.said[2] and "is given up" in fleet.said[2]
    asked = requests(6)
    assert_whole(asked, fleet.collect(fleet.submit(asked)), 0)


@pytest.mark.parametrize("waits", ["for engines", "for groups", "in a sync"])
def test_waiting_ends_when_the_run_is_stopped(fleets, waits):
    class Stopped(Exception):
        pass

    stopped = threading.Event()

    def check() -> None:
        if stopped.is_set():
            raise Stopped

    faults = {"for engines": {(0, 0): "never"}, "in a sync": {(0, 0): "hangs"}}.get(waits, {})
    fleet = fleets(faults, engines=1, check=check)
    if waits == "for groups":
        fleet.load(ThreeBuckets(), 0)
        handle = fleet.submit(requests(1, tokens=100_000))
    threading.Timer(1.0, stopped.set).start()
    started = time.monotonic()
    with pytest.raises(Stopped):
        if waits == "for groups":
            fleet.collect(handle)
        else:
            fleet.load(ThreeBuckets(), 0)
    assert time.monotonic() - started < 10


def test_waiting_for_room_ends_when_the_run_is_stopped(cluster):
    class Stopped(Exception):
        pass

    def check() -> None:
        raise Stopped

    started = time.monotonic()
    with pytest.raises(Stopped):
        with reserved({"CPU": 1000.0}, 1, label="", timeout=60.0, check=check):
            pass
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("fault", ["", "dies"], ids=["while it samples", "in a sync"])
def test_a_fleet_that_can_make_no_more_engines_says_so(fleets, fault):
    def make(slot: int, before: int):
        if before:
            raise RuntimeError("the cluster is gone")
        return ray.remote(SmallEngine).options(num_cpus=0, max_concurrency=1000).remote(fault)

    fleet = fleets(engines=1, make=make)
    with pytest.raises(SamplingFailed, match="the cluster is gone"):
        fleet.load(ThreeBuckets(), 0)
        fleet.collect(fleet.submit(requests(1, prefix="poison")))


def gone(pid: int) -> bool:
    """Whether a process ends within some seconds."""
    try:
        psutil.Process(pid).wait(20)
    except psutil.NoSuchProcess:
        return True
    except psutil.TimeoutExpired:
        return False
    return True
