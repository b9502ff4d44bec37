"""The client of reward servers, against servers that refuse, stall, send garbage, or die half-way."""

import contextlib
import http.server
import json
import socket
import threading
import time

import pytest
from judged_groups import decode, rollout

from lmmr1_jax.config.schema import RewardsConfig
from lmmr1_jax.rewards.sources.base import Group, RewardFailed, Rewards
from lmmr1_jax.rewards.sources.http import ServerSource
from lmmr1_jax.rewards.sources.specs import ServerSpec
from lmmr1_jax.rewards.workers.pool import WorkerFailure
from lmmr1_jax.runtime.errors import UserError
from lmmr1_jax.types.records import Reward


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append((self.path, body, time.monotonic()))
            behave = self.server.script.pop(0) if self.server.script else right
        with contextlib.suppress(OSError):
            behave(self, body)
        self.close_connection = True

    def log_message(self, *_):
        pass


def send(handler, content, status=200, length=None, headers=()):
    handler.send_response(status)
    for name, value in headers:
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(content) if length is None else length))
    handler.end_headers()
    handler.wfile.write(content)


def right(handler, body):
    """A reward per item: the length of what was written."""
    lengths = [len(q) - len(p) for q, p in zip(body["query"], body["prompts"], strict=True)]
    send(handler, json.dumps({"rewards": lengths, "acc_rewards": [1.0] * len(lengths), "note": "x"}).encode())


def answering(content, **more):
    return lambda handler, body: send(handler, content, **more)


def stall(handler, body):
    time.sleep(60.0)


def drip(handler, body):
    """A byte now and then: every read of it ends in time."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(900):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def drip_headers(handler, body):
    for byte in b"HTTP/1.1 200 OK\r\nX: " + b"x" * 900:
        handler.wfile.write(bytes([byte]))
        handler.wfile.flush()
        time.sleep(0.05)


def endless(handler, body):
    handler.send_response(200)
    handler.end_headers()
    for _ in range(1000):
        handler.wfile.write(b" " * 65536)


def die_halfway(handler, body):
    send(handler, b'{"rewards": [1', length=500)


def hang_up(handler, body):
    handler.connection.shutdown(socket.SHUT_RDWR)


def deep(handler, body):
    send(handler, b"[" * 60_000)


@contextlib.contextmanager
def serving(*script):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.script, server.seen, server.lock = list(script), [], threading.Lock()
    server.url = f"http://127.0.0.1:{server.server_address[1]}/get_reward"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def source(*urls, interrupt=lambda: None, **changes):
    settings = {"url_timeout": 20.0, "url_tries": 3, "url_wait": 0.05, **changes}
    return ServerSource(ServerSpec("judge", 0.5, urls), RewardsConfig(**settings), interrupt)


def judge(client, *rollouts):
    return client.score([Group(r, decode) for r in rollouts])


def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_the_contract_is_lmm_r1s_and_every_list_is_a_part():
    with serving() as server:
        ((one, two), (three,)) = judge(source(server.url), rollout(["ab<|im_end|>", ""]), rollout(["abc"], "4"))
        ((path, body, _),) = server.seen
    assert path == "/get_reward" and body["labels"] == ["3", "3", "4"]
    assert body["query"][0] == body["prompts"][0] + "ab<|im_end|>" and "<|im_start|>user" in body["prompts"][0]
    assert one == Reward(0.5 * 12, {"judge": 12.0, "judge/acc": 1.0}) and (two.total, three.total) == (0.0, 1.5)


def test_what_the_server_could_not_judge_is_counted_and_earns_nothing():
    named = b'{"rewards": [1.5, 0.5], "faults": ["timeout", null]}'
    others = [b'{"rewards": [1.5, 0.5], "faults": %s}' % faults for faults in (b"2", b'["no", {}]', b'["died"]')]
    with serving(*map(answering, (named, *others))) as server:
        told = [judge(source(server.url), rollout(["a", "b"]))[0] for _ in range(4)]
    assert told[0] == [Reward(0.0, {"judge": 1.5}, "timeout"), Reward(0.25, {"judge": 0.5})]
    assert [[verdict.fault for verdict in group] for group in told[1:]] == [[None, None]] * 3


BAD = {
    "hangs up": hang_up,
    "dies half-way": die_halfway,
    "error 500": answering(b"{}", status=500),
    "too many requests": answering(b"{}", status=429),
    "not JSON": answering(b"<html>"),
    "not UTF-8": answering(b"\xff\xfe"),
    "a list": answering(b"[1.0]"),
    "no rewards": answering(b"{}"),
    "too few": answering(b'{"rewards": []}'),
    "NaN": answering(b'{"rewards": [NaN]}'),
    "infinite": answering(b'{"rewards": [1e999]}'),
    "a huge integer": answering(b'{"rewards": [1' + b"0" * 400 + b"]}"),
    "a text": answering(b'{"rewards": ["1"]}'),
    "a truth": answering(b'{"rewards": [true]}'),
    "parts that do not fit": answering(b'{"rewards": [1], "acc_rewards": [1, 2]}'),
    "nested deep": deep,
}


@pytest.mark.parametrize("name", BAD)
def test_what_may_be_better_the_next_time_is_tried_again(name):
    with serving(BAD[name]) as server:
        assert judge(source(server.url), rollout(["abc"]))[0][0].total == 1.5
        assert len(server.seen) == 2


@pytest.mark.parametrize("behave", [stall, drip, drip_headers], ids=lambda f: f.__name__)
def test_a_server_that_stalls_is_left_after_the_time_limit(behave):
    with serving(behave) as server:
        start = time.monotonic()
        assert judge(source(server.url, url_timeout=0.8), rollout(["abc"]))[0][0].total == 1.5
        assert 0.7 < time.monotonic() - start < 5


def test_an_answer_without_end_is_not_read_to_its_end():
    with serving(endless, endless, endless) as server:
        ((fault,),) = judge(source(server.url), rollout(["abc"]))
    assert "more than 66560 bytes" in fault.detail


def test_waits_double_and_the_fault_names_address_cause_and_tries():
    broken = answering(b"out of order", status=503)
    with serving(broken, broken, broken) as server:
        ((fault,),) = judge(source(server.url, url_wait=0.2), rollout(["abc"]))
        first, second, third = [when for _, _, when in server.seen]
    assert isinstance(fault, WorkerFailure) and fault.kind == "error"
    assert fault.detail == f"{server.url}: status 503: 'out of order' (3 tries)"
    assert second - first > 0.19 and third - second > 0.39


def test_a_refusal_that_is_certain_is_not_repeated_and_redirects_are_not_followed():
    moved = answering(b"", status=307, headers=[("Location", "file:///etc/passwd")])
    for script, words in ((answering(b"no", status=404), "status 404"), (moved, "status 307")):
        with serving(script) as server:
            ((fault,),) = judge(source(server.url), rollout(["abc"]))
            assert words in fault.detail and len(server.seen) == 1


def test_a_server_that_is_not_there_yet_is_waited_for():
    port = closed_port()
    with contextlib.ExitStack() as stack:

        def come_up():
            server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
            server.script, server.seen, server.lock = [], [], threading.Lock()
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()

        timer = threading.Timer(0.3, come_up)
        timer.start()
        client = source(f"http://127.0.0.1:{port}/get_reward", url_tries=6, url_wait=0.1)
        assert judge(client, rollout(["abc"]))[0][0].total == 1.5
        timer.join()


def test_several_addresses_share_the_work_and_stand_in_for_each_other():
    with serving() as one, serving() as two:
        client = source(one.url, f"http://127.0.0.1:{closed_port()}/", two.url)
        verdicts = judge(client, *[rollout(["x" * (i % 7)] * 64, name=str(i)) for i in range(9)])
        assert [group[0].total for group in verdicts] == [0.5 * (i % 7) for i in range(9)]
        assert min(len(one.seen), len(two.seen)) >= 3


def test_a_server_that_is_down_is_asked_once_for_each_request_until_it_is_up_again():
    broken = answering(b"", status=500)
    with serving(*[broken] * 4) as server:
        client = source(server.url)
        assert isinstance(judge(client, rollout(["abc"]))[0][0], WorkerFailure) and len(server.seen) == 3
        assert isinstance(judge(client, rollout(["abc"]))[0][0], WorkerFailure) and len(server.seen) == 4
        assert judge(client, rollout(["abc"]))[0][0].total == 1.5
        server.script.append(broken)
        assert judge(client, rollout(["abc"]))[0][0].total == 1.5  # tries are as many as before


def test_only_the_requests_that_failed_are_given_up():
    def picky(handler, body):
        (right if body["labels"][0] != "bad" else answering(b"{}", status=400))(handler, body)

    with serving(*[picky] * 3) as server:
        groups = [rollout(["abc"] * 64, label=label) for label in ("1", "bad", "2")]
        one, bad, two = judge(source(server.url), *groups)
    assert one[0].total == two[0].total == 1.5 and all(isinstance(fault, WorkerFailure) for fault in bad)


def test_the_config_says_whether_a_dead_server_ends_the_run_or_costs_its_completions():
    url = f"http://127.0.0.1:{closed_port()}/get_reward"
    with pytest.raises(RewardFailed, match="ConnectionRefusedError.*3 tries"):
        Rewards([source(url)], decode, on_error="stop").score([rollout(["abc"])])
    with pytest.raises(UserError, match="ConnectionRefusedError"):
        Rewards([source(url)], decode, on_error="stop").check(rollout(["abc"]))
    rewards = Rewards([source(url)], decode, on_error="zero")
    (scored,) = rewards.score([rollout(["abc"])])
    assert (scored.rewards[0].total, scored.rewards[0].fault) == (0.0, "error")
    assert "ConnectionRefusedError" in rewards.warnings()[0]


def test_a_run_that_is_told_to_stop_does_not_wait_for_a_server():
    class Stop(Exception):
        pass

    began = time.monotonic()

    def interrupt():
        if time.monotonic() - began > 0.3:
            raise Stop

    with serving(stall) as server, pytest.raises(Stop):
        judge(source(server.url, url_timeout=100.0, interrupt=interrupt), rollout(["abc"]))
    assert time.monotonic() - began < 5


def test_nothing_to_judge_is_nothing():
    assert judge(source("http://127.0.0.1:1/")) == []
