"""A completion's reward never depends on another completion's fate, and no worker outlives the run."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from waiting import alive, wait_until

from lmmr1_jax.config.schema import RewardsConfig
from lmmr1_jax.rewards.rules.service import Verifier

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes through /proc")

REPOSITORY = Path(__file__).parents[2]
LIMIT = 1.0
HANG = "9^{9^{9^{9}}}"
BOMBS = {
    "tower of powers": HANG,
    "fractions nested 10,000 deep": "\\frac{1}{" * 10_000 + "1" + "}" * 10_000,
    "a megabyte of braces": "{" * 500_000 + "}" * 500_000,
    "a megabyte of opening braces": "{" * 1_000_000,
    "unbalanced": "\\frac{1}{",
    "a large power": "10^{10^{8}}",
    "a large factorial": "10000000!",
}


def boxed(content: object) -> str:
    return f"<think>so</think><answer>$\\boxed{{{content}}}$</answer>"


def fork_server_of(verifier: Verifier) -> int:
    return int(Path(f"/proc/{verifier.pids()[0]}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.fixture(scope="module")
def verifier():
    with Verifier(RewardsConfig(timeout=LIMIT)) as pool:
        pool.score([boxed(1)] * 4, ["1"] * 4)
        yield pool


def test_rewards_come_in_order_with_their_weights():
    with Verifier(RewardsConfig(accuracy_weight=2.0, format_weight=0.25)) as pool:
        rewards = pool.score([boxed(i) for i in range(100)], [str(i - i % 2) for i in range(100)])
    assert [reward.total for reward in rewards] == [2.25, 0.25] * 50
    assert rewards[0].parts == {"accuracy": 1.0, "format": 1.0} and rewards[0].fault is None


def test_the_variant_and_the_prompts_reach_the_rules():
    with Verifier(RewardsConfig(variant="lmm-r1", workers=1)) as pool:
        rewards = pool.score(["", boxed(3)], ["2", "$$"], [boxed(2), ""])
    assert [reward.total for reward in rewards] == [1.5, 1.5]


def test_nothing_to_score_is_nothing(verifier):
    assert verifier.score([], []) == []


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_costs_its_own_completion_at_most_the_limit_and_a_restart(verifier, name):
    start = time.monotonic()
    rewards = verifier.score([boxed(3), boxed(BOMBS[name]), boxed(3), boxed(4)], ["3"] * 4)
    assert time.monotonic() - start < LIMIT + 2.0
    assert [rewards[i].total for i in (0, 2, 3)] == [1.5, 1.5, 0.5]
    assert rewards[1].parts["accuracy"] == 0.0
    assert rewards[1].fault in (None, "timeout") and (rewards[1].fault is None or rewards[1].total == 0.0)


def test_bombs_among_many_leave_every_other_reward_as_it_was(verifier):
    texts = [boxed(f"\\frac{{{i}}}{{7}}") for i in range(60)]
    labels = [f"{i - i % 3}/7" for i in range(60)]
    before = verifier.score(texts, labels)
    places = (0, 17, 18, 59)
    for place in places:
        texts[place] = boxed(HANG)
    after = verifier.score(texts, labels)
    assert [i for i in range(60) if before[i] != after[i]] == list(places)
    assert [reward.fault for reward in after if reward.fault] == ["timeout"] * len(places)


@pytest.mark.parametrize("name", ["tower of powers", "fractions nested 10,000 deep", "unbalanced"])
def test_bombs_under_lmm_r1_cost_their_own_completion(name):
    with Verifier(RewardsConfig(variant="lmm-r1", timeout=LIMIT)) as pool:
        pool.score([boxed(1)], ["1"])
        start = time.monotonic()
        rewards = pool.score([boxed(3), boxed(BOMBS[name]), boxed(3)], ["3"] * 3)
    assert time.monotonic() - start < LIMIT + 2.0
    assert rewards[0].total == rewards[2].total == 1.5 and rewards[1].parts["accuracy"] == 0.0


def test_a_worker_that_dies_costs_the_completion_in_its_hands():
    with Verifier(RewardsConfig(timeout=30.0, workers=1)) as pool:
        pool.score([boxed(1)], ["1"])
        victim = pool.pids()[0]
        threading.Timer(2.0, os.kill, (victim, signal.SIGKILL)).start()
        rewards = pool.score([boxed(3), boxed(HANG), boxed(3)], ["3"] * 3)
        assert [reward.fault for reward in rewards] == [None, "died", None]
        assert [reward.total for reward in rewards] == [1.5, 0.0, 1.5]


def test_a_worker_that_dies_idle_costs_nothing(verifier):
    for pid in verifier.pids():
        os.kill(pid, signal.SIGKILL)
        assert wait_until(lambda pid=pid: not alive(pid))
    assert [reward.total for reward in verifier.score([boxed(3)] * 8, ["3"] * 8)] == [1.5] * 8


def test_the_pool_survives_the_loss_of_its_fork_server(verifier):
    server_pid = fork_server_of(verifier)
    workers = verifier.pids()
    os.kill(server_pid, signal.SIGKILL)
    assert wait_until(lambda: not any(alive(pid) for pid in workers))
    assert [reward.total for reward in verifier.score([boxed(3)] * 8, ["3"] * 8)] == [1.5] * 8


def test_a_worker_may_not_eat_the_machine():
    """A worker's address space is limited, and when the machine runs out of memory it goes before the run does."""
    with Verifier(RewardsConfig(workers=1), memory_bytes=400 << 20) as pool:
        assert pool.score([boxed(3)], ["3"])[0].total == 1.5
        folder = Path(f"/proc/{pool.pids()[0]}")
        limits = [line.split() for line in (folder / "limits").read_text().splitlines()]
        assert ["Max", "address", "space", str(400 << 20), str(400 << 20), "bytes"] in limits
        assert (folder / "oom_score_adj").read_text().strip() == "1000"


def test_start_up_is_not_counted_against_the_first_completions():
    with Verifier(RewardsConfig(timeout=0.5)) as pool:  # importing the rules takes longer than that
        assert [reward.total for reward in pool.score([boxed(3)] * 4, ["3"] * 4)] == [1.5] * 4


def test_gold_answers_are_checked_within_the_limit(verifier):
    assert verifier.parsable(["60", "", "$$", "\\frac43", "A"]) == [True, False, False, True, True]


def test_workers_load_nothing_of_jax(verifier):
    """Every library that a process has loaded stands in its memory map; jaxlib's would be among them."""
    verifier.score([boxed("x^2")] * 4, ["x^2"] * 4)
    for pid in [fork_server_of(verifier), *verifier.pids()]:
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert not any(name in maps for name in ("jaxlib", "numpy", "torch", "flax"))
    code = (
        "import sys, lmmr1_jax.rewards.workers.fork_server, lmmr1_jax.rewards.rules.worker_job as job; job.prepare(); "
        "print([m for m in sys.modules if m[:3] == 'jax'])"
    )
    printed = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "[]"


def test_closing_ends_every_process_even_a_busy_one():
    pool = Verifier(RewardsConfig(timeout=60.0))
    pool.score([boxed(1)] * 4, ["1"] * 4)
    processes = [fork_server_of(pool), *pool.pids()]
    raised = []

    def score():
        try:
            pool.score([boxed(HANG)] * 2, ["3"] * 2)
        except RuntimeError as error:
            raised.append(str(error))

    scoring = threading.Thread(target=score)
    scoring.start()
    assert wait_until(lambda: any(worker.assigned for worker in pool._pool._workers))
    pool.close()
    pool.close()
    scoring.join(5.0)
    assert raised == ["the verifier was closed while it worked"]
    assert not any(map(alive, processes))
    with pytest.raises(RuntimeError, match="closed"):
        pool.score([boxed(1)], ["1"])


SCRIPT = """
    import signal, sys
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started deaf to it
    assert __name__ == "__main__"  # a worker that imported this file again would fail here
    from lmmr1_jax.config.schema import RewardsConfig
    from lmmr1_jax.rewards.rules.service import Verifier

    hang = "<think>so</think><answer>$\\\\boxed{9^{9^{9^{9}}}}$</answer>"
    pool = Verifier(RewardsConfig(timeout=60.0, workers=2))
    while len(pool.pids()) < 2:
        pool.score(["<answer>1</answer>"] * 4, ["1"] * 4)
    stat = open(f"/proc/{pool.pids()[0]}/stat").read()
    print(stat.rpartition(")")[2].split()[1], *pool.pids(), flush=True)
    pool.score([hang] * 2, ["3"] * 2)
"""


@pytest.fixture
def busy_run(tmp_path):
    """A process of its own group whose verifier works on two bombs, and the pids of its server_pid and workers."""
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(SCRIPT))
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
    run = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    try:
        pids = [int(pid) for pid in run.stdout.readline().split()]
        time.sleep(0.3)  # let the workers begin
        assert len(pids) == 3 and all(map(alive, pids))
        yield run, pids
    finally:
        run.kill()
        run.wait()
        run.stdout.close()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_process_outlives_the_run(busy_run, end):
    run, pids = busy_run
    os.kill(run.pid, end)
    run.wait(timeout=20)
    assert wait_until(lambda: not any(map(alive, pids)), 5.0)


def test_signals_to_the_group_leave_the_workers_to_the_run(busy_run):
    _, pids = busy_run
    for pid in pids:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(pid, number)
    time.sleep(0.3)
    assert all(map(alive, pids))


def test_an_interrupted_call_leaves_no_answers_to_the_next(verifier, monkeypatch):
    import lmmr1_jax.rewards.workers.pool as module

    calls = iter(range(10**6))

    def interrupted(*arguments, **keywords):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return real(*arguments, **keywords)

    real = module.wait
    monkeypatch.setattr(module, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        verifier.score([boxed(3)] * 200, ["3"] * 200)
    assert [reward.total for reward in verifier.score([boxed(4)] * 50, ["3"] * 50)] == [0.5] * 50
