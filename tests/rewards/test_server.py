"""The verifier as a service: LMM-R1's contract, bounded in all it takes, and unharmed by what it judges."""

import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from judged_groups import decode, rollout
from test_pool import BOMBS
from waiting import wait_until

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from lmmr1_jax.config.schema import RewardsConfig  # noqa: E402
from lmmr1_jax.rewards.rules.service import Verifier  # noqa: E402
from lmmr1_jax.rewards.server import response_in  # noqa: E402
from lmmr1_jax.rewards.sources.base import Group  # noqa: E402
from lmmr1_jax.rewards.sources.http import ServerSource  # noqa: E402
from lmmr1_jax.rewards.sources.specs import ServerSpec  # noqa: E402
from lmmr1_jax.rewards.workers.pool import Inbox  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes through /proc")

REPOSITORY = Path(__file__).parents[2]
MARK = "<|im_start|>assistant\n"
HANG = "<think>so</think><answer>$\\boxed{9^{9^{9^{9}}}}$</answer>"
LIMIT = 1.0


def answer(content: object) -> str:
    return f"<think>so</think><answer>$\\boxed{{{content}}}$</answer>"


@contextlib.contextmanager
def serving(*flags):
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "lmmr1_jax.rewards.server", "--port", "0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        line = process.stdout.readline()
        process.port = int(re.search(r"http://127\.0\.0\.1:(\d+)/get_reward", line)[1])
        yield process
    finally:
        process.terminate()
        assert process.wait(20) in (0, -signal.SIGTERM)
        process.stdout.close()


@pytest.fixture(scope="module")
def server():
    with serving("--workers", "2", "--timeout", str(LIMIT), "--max-items", "200", "--max-bytes", "3000000") as process:
        for _ in range(2):
            ask(process, [answer(1)] * 8, ["1"] * 8)
        await_health(process, workers=2)
        yield process


def request(server, method, path, body=None):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def ask(server, texts, labels, **more):
    body = {"query": [f"What?{MARK}{text}<|im_end|>" for text in texts], "labels": labels, **more}
    status, told = request(server, "POST", "/get_reward", json.dumps(body))
    assert status == 200, told
    return told


def health(server):
    return request(server, "GET", "/health")[1]


def await_health(server, **wanted):
    """Until it says so of itself."""
    assert wait_until(lambda: wanted.items() <= health(server).items(), 20), health(server)


def processes(server):
    """The server's process and all below it, by their parents."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [server.pid]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def resident_bytes(pids):
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError, TypeError):  # it has just ended
            total += 1024 * int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1])
    return total


def test_the_contract_is_lmm_r1s(server):
    told = ask(server, [answer(3), answer(4), "$\\boxed{3}$", ""], ["3"] * 4, prompts=["a", "b", "c", "d"])
    assert told["rewards"] == [1.5, 0.5, 0.0, 0.0]
    assert told["format_rewards"] == [1.0, 1.0, 0.0, 0.0] and told["acc_rewards"] == [1.0, 0.0, 0.0, 0.0]
    assert told["faults"] == [None] * 4
    assert ask(server, [], [])["rewards"] == []


def test_an_item_may_name_its_verifier(server):
    told = ask(server, ["<answer>A or B</answer>"] * 2, ["A or B"] * 2, verifiers=["text", "choice"])
    assert told["acc_rewards"] == [1.0, 0.0]


def test_two_hundred_requests_at_once_a_tenth_of_them_bombs(server):
    """All others are answered right, memory stays bounded, and every worker is there afterwards."""
    bombs = [HANG, *(answer(bomb) for bomb in BOMBS.values())]
    largest = 0

    def one(number):
        if number % 10 == 0:
            return ask(server, [bombs[number // 10 % len(bombs)]], ["3"])
        return ask(server, [answer(number), answer(number + 1), answer("\\frac{1}{2}")], [str(number)] * 2 + ["0.5"])

    with ThreadPoolExecutor(200) as threads:
        told = [threads.submit(one, number) for number in range(200)]
        while not all(future.done() for future in told):
            largest = max(largest, resident_bytes(processes(server)))
            time.sleep(0.2)
    for number, future in enumerate(told):
        if number % 10 == 0:
            assert future.result()["acc_rewards"] == [0.0]
            if number // 10 % len(bombs) == 0:
                assert future.result()["faults"] == ["timeout"]
        else:
            assert future.result()["rewards"] == [1.5, 0.5, 1.5] and future.result()["faults"] == [None] * 3
    assert largest < 1 << 30
    assert ask(server, [answer(3)] * 50, ["3"] * 50)["rewards"] == [1.5] * 50
    await_health(server, workers=2, requests=0, bytes=0)


def test_requests_that_are_answered_do_not_wait_for_a_bomb_that_came_before_them(server):
    with ThreadPoolExecutor(1) as threads:
        bomb = threads.submit(ask, server, [HANG] * 3, ["3"] * 3)
        time.sleep(0.2)
        for _ in range(20):
            assert ask(server, [answer(3)], ["3"])["rewards"] == [1.5]
        assert bomb.result()["rewards"] == [0.0] * 3


def test_our_client_and_our_server_agree(server):
    spec = ServerSpec("judge", 1.0, (f"http://127.0.0.1:{server.port}/get_reward",))
    client = ServerSource(spec, RewardsConfig(url_tries=1))
    groups = [Group(rollout([answer(3) + "<|im_end|>", HANG, answer(4)], prompt=f"Box: {MARK}What?{MARK}"), decode)]
    ((right, bomb, wrong),) = client.score(groups)
    assert right.parts == {"judge": 1.5, "judge/format": 1.0, "judge/acc": 1.0}
    assert (bomb.total, wrong.total) == (0.0, 0.5) and (bomb.fault, wrong.fault) == ("timeout", None)


REFUSED = {
    "not JSON": (b"{", 400, "not JSON"),
    "nested deep": (b"[" * 100_000, 400, "not JSON"),
    "a list": (b"[]", 400, "not a JSON object"),
    "no query": (b'{"labels": []}', 400, "'query' must be a list of texts"),
    "one text": (b'{"query": "x", "labels": ["3"]}', 400, "'query' must be a list of texts"),
    "no labels": (b'{"query": ["x"]}', 400, "'labels' must be a list of texts"),
    "numbers": (b'{"query": ["x"], "labels": [3]}', 400, "'labels' must be a list of texts"),
    "too few": (b'{"query": ["x", "y"], "labels": ["3"]}', 400, "'labels' has 1 items, but 'query' has 2"),
    "unknown verifier": (b'{"query": ["x"], "labels": ["3"], "verifiers": ["os"]}', 400, "no verifier 'os'"),
    "too many items": (json.dumps({"query": [""] * 201, "labels": [""] * 201}).encode(), 413, "at most 200"),
    "too long": (b" " * 3_000_001, 413, "longer than 3000000 bytes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_the_contract_or_too_much_is_refused_in_a_line(server, name):
    body, status, words = REFUSED[name]
    given, told = request(server, "POST", "/get_reward", body)
    assert given == status and words in told["error"]
    assert health(server)["bytes"] == 0


def test_it_listens_to_this_machine_alone(server):
    addresses = {family[4][0] for family in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    for address in addresses - {"127.0.0.1"} - {a for a in addresses if a.startswith("127.")}:
        with pytest.raises(OSError), socket.create_connection((address, server.port), timeout=2):
            pass
    listening = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    local = [words[1] for words in listening if int(words[1].split(":")[1], 16) == server.port and words[3] == "0A"]
    assert local == [f"0100007F:{server.port:04X}"]


def test_it_loads_nothing_of_jax(server):
    assert not re.search("jaxlib|numpy|torch|flax", Path(f"/proc/{server.pid}/maps").read_text())


def test_too_many_requests_at_a_time_are_refused_and_a_slow_body_holds_nobody_up():
    with serving("--workers", "1", "--timeout", "6", "--max-requests", "2") as small:
        ask(small, [answer(1)], ["1"])
        slow = socket.create_connection(("127.0.0.1", small.port))
        slow.sendall(b"POST /get_reward HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
        await_health(small, requests=1)
        assert ask(small, [answer(1)], ["1"])["rewards"] == [1.5]
        with ThreadPoolExecutor(1) as threads:
            bomb = threads.submit(ask, small, [HANG], ["3"])
            await_health(small, requests=2)
            assert request(small, "POST", "/get_reward", b"{}")[0] == 503
            assert bomb.result()["faults"] == ["timeout"]
        slow.close()
        await_health(small, requests=0)  # whoever hangs up is forgotten


def test_ending_it_ends_its_workers_even_busy_ones():
    with serving("--workers", "1", "--timeout", "60") as busy:
        ask(busy, [answer(1)], ["1"])
        pids = processes(busy)
        with ThreadPoolExecutor(1) as threads:
            hanging = threads.submit(ask, busy, [HANG], ["3"])
            await_health(busy, requests=1)
            busy.terminate()
            busy.wait(20)
            with pytest.raises(AssertionError, match="the server is ending"):
                hanging.result()
    assert len(pids) == 3 and not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--port", "x"], "--port"),
        (["--accuracy-weight", "nan"], "--accuracy-weight: must be a finite number, not 'nan'"),
        (["--timeout", "0"], "--timeout: must be a number above 0, not '0'"),
        (["--verifier", "os"], "--verifier: there is no verifier 'os'"),
        (["--host", "192.0.2.1"], "cannot listen at 192.0.2.1 port 5000"),
        (["--port", "99999"], "cannot listen at 127.0.0.1 port 99999"),
    ],
)
def test_flags_that_cannot_be_used_are_one_line(flags, words):
    command = [sys.executable, "-m", "lmmr1_jax.rewards.server", *flags]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert run.returncode == 2 and words in run.stderr and run.stderr.count("\n") == 1


def test_without_fastapi_it_names_the_extra():
    code = (
        "import sys; sys.modules['fastapi'] = sys.modules['uvicorn'] = None\n"
        "from lmmr1_jax.runtime.cli import run_cli\n"
        "from lmmr1_jax.rewards.server import main\nrun_cli(lambda: main([]))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, timeout=60)
    assert run.returncode == 2 and "pip install 'lmmr1-jax[server]'" in run.stderr and run.stderr.count("\n") == 1


def test_the_response_is_what_follows_the_prompt_or_else_the_first_mark():
    assert response_in(f"a{MARK}b{MARK}c", f"a{MARK}b{MARK}") == "c"
    assert response_in(f"a{MARK}b{MARK}c", "another") == f"b{MARK}c"
    assert response_in("User: 1\n\nAssistant: 2") == "2" and response_in("no mark") == "no mark"
    assert response_in(f"a{MARK}") == ""


def test_an_inbox_answers_all_that_came_before_it_closed():
    async def ask_all(verifier, inbox):
        loop = asyncio.get_running_loop()
        serving = loop.run_in_executor(None, verifier.serve, inbox)
        futures = [asyncio.wrap_future(inbox.submit(verifier.task(answer(i), str(i)))) for i in range(100)]
        inbox.close()
        told = [verifier.reward(told).total for told in await asyncio.gather(*futures)]
        await serving
        return told

    with Verifier(RewardsConfig()) as verifier:
        inbox = Inbox()
        assert asyncio.run(ask_all(verifier, inbox)) == [1.5] * 100
        with pytest.raises(RuntimeError, match="closed"):
            inbox.submit(verifier.task("", ""))
        assert verifier.score([answer(3)], ["3"])[0].total == 1.5
