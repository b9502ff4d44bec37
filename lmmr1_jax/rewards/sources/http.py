"""A reward server as a source: LMM-R1's contract over HTTP, with time limits, retries and back-off.

    POST {"query": [prompt + completion, ...], "prompts": [prompt, ...], "labels": [gold answer, ...]}
    -> {"rewards": [1.5, ...], and other lists of the same length, each a part of its own}

Our own server names in "faults" what it could not judge: such a completion is counted and earns 0, as with the rules.

What comes back is data from another machine: at most so many bytes of it are read, as JSON, and every number is looked
at. Redirects are not followed, and nothing of the environment (proxies, credentials) is used.
"""

from __future__ import annotations

import collections
import contextlib
import http.client
import itertools
import json
import math
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import Any
from urllib.parse import urlsplit

from lmmr1_jax.config.schema import RewardsConfig
from lmmr1_jax.rewards.sources.base import Group, Scored, nobody, refuse_fault
from lmmr1_jax.rewards.sources.specs import ServerSpec
from lmmr1_jax.rewards.workers.pool import WorkerFailure
from lmmr1_jax.types.records import Reward

REQUESTS_AT_A_TIME = 8
"""Per address."""

COMPLETIONS_PER_REQUEST = 64
"""Whole groups up to so many, at least one group."""

LONGEST_WAIT = 60.0
"""Seconds between two tries."""


_FAULTS = [None, "timeout", "died", "error"]


class ServerError(Exception):
    """A request came to nothing; the message says why. `certain`: it would again."""

    def __init__(self, message: str, *, certain: bool = False, timeout: bool = False):
        super().__init__(message)
        self.certain, self.timeout = certain, timeout


class ServerSource:
    """One or several addresses that give the same reward; requests are dealt to them in turn.

    Attributes:
      name: the head of its parts' names.
    """

    def __init__(self, spec: ServerSpec, config: RewardsConfig, interrupt: Callable[[], None] = lambda: None):
        """
        Args:
          interrupt: called several times a second while waiting; what it raises ends the wait.
        """
        self.name = spec.name
        self._weight, self._urls, self._config, self._interrupt = spec.weight, spec.urls, config, interrupt
        self._turn = itertools.count()
        self._down = False  # since a request was given up and until one is answered

    def check(self, group: Group) -> None:
        """`sources.RewardSource.check`: one request, with all its tries."""
        refuse_fault(self.score([group]))

    def score(self, groups: Sequence[Group], scored: Scored = nobody) -> list[list[Reward | WorkerFailure]]:
        """`sources.RewardSource.score`: the rewards are the part `NAME`, `acc_rewards` are `NAME/acc`, and so on."""
        parts = list(_parts(groups))
        queue = collections.deque((Future(), part) for part in parts)
        asked = [future for future, _ in queue]
        given_up = threading.Event()

        def work() -> None:
            while not given_up.is_set():
                try:
                    future, part = queue.popleft()
                except IndexError:
                    return
                try:
                    future.set_result(self._ask(part, given_up))
                    scored(sum(len(group.rollout.completions) for group in part))
                except BaseException as error:
                    future.set_exception(error)

        # Daemons: a run that is told to stop does not wait for a server that stalls.
        for _ in range(min(len(parts), REQUESTS_AT_A_TIME * len(self._urls))):
            threading.Thread(target=work, daemon=True).start()
        try:
            pending: Any = asked
            while pending:
                pending = wait(pending, timeout=0.2, return_when=FIRST_EXCEPTION).not_done
                self._interrupt()
            return [results for future in asked for results in future.result()]
        finally:
            given_up.set()  # whoever waits for the next try stops waiting

    def close(self) -> None:
        """Nothing: every request has a connection of its own."""

    def _ask(self, groups: Sequence[Group], given_up: threading.Event) -> list[list[Reward | WorkerFailure]]:
        """The results on some groups, after as many tries as it takes or as are allowed."""
        body = json.dumps(
            {
                "query": [group.raw_prompt + text for group in groups for text in group.raw_texts],
                "prompts": [group.raw_prompt for group in groups for _ in group.texts],
                "labels": [group.label for group in groups for _ in group.texts],
            }
        ).encode()
        count = sum(len(group.texts) for group in groups)
        # While the server is known to be down one try is enough to see whether it still is.
        tries = 1 if self._down else self._config.url_tries
        for number in range(1, tries + 1):
            url = self._urls[next(self._turn) % len(self._urls)]
            try:
                content = post(url, body, self._config.url_timeout, 65_536 + 1024 * count)
                rewards, faults = read_answer(content, count)
            except ServerError as error:
                if number < tries and not error.certain:
                    given_up.wait(min(self._config.url_wait * 2.0 ** min(number - 1, 16), LONGEST_WAIT))
                    if not given_up.is_set():
                        continue
                self._down = self._down or not error.certain
                times = f" ({number} tries)" if number > 1 else ""
                fault = WorkerFailure("timeout" if error.timeout else "error", f"{url}: {error}{times}")
                return [[fault] * len(group.texts) for group in groups]
            self._down = False
            results = iter(self._reward(rewards, row, faults[row]) for row in range(count))
            return [[next(results) for _ in group.texts] for group in groups]
        raise AssertionError("unreachable")

    def _reward(self, rewards: dict[str, list[float]], row: int, fault: str | None) -> Reward:
        parts = {
            self.name if key == "rewards" else f"{self.name}/{key.removesuffix('_rewards')}": column[row]
            for key, column in rewards.items()
        }
        return Reward(0.0 if fault else self._weight * rewards["rewards"][row], parts, fault)


def post(url: str, body: bytes, timeout: float, most_bytes: int) -> bytes:
    """The body of the answer to a POST of JSON.

    Args:
      timeout: seconds for all of it: a server that sends a byte now and then has no more.
      most_bytes: of the answer's body.

    Raises:
      ServerError: no connection, a status other than 200, an answer that is too long, or no time left.
    """
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    connection = (http.client.HTTPSConnection if secure else http.client.HTTPConnection)(
        parts.hostname, parts.port, timeout=timeout
    )
    expired = threading.Event()
    connected: list[socket.socket] = []

    def expire() -> None:
        expired.set()
        for open_socket in connected:
            with contextlib.suppress(OSError):
                open_socket.shutdown(socket.SHUT_RDWR)  # the thread that reads from it wakes up

    clock = threading.Timer(timeout, expire)
    clock.daemon = True
    clock.start()
    try:
        connection.connect()
        connected.append(connection.sock)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("POST", path, body, {"Content-Type": "application/json", "Connection": "close"})
        answer = connection.getresponse()
        content = answer.read(most_bytes + 1)
        if expired.is_set():
            raise TimeoutError
        if answer.status != 200:
            text = " ".join(content[:200].decode("utf-8", "replace").split())
            certain = 300 <= answer.status < 500 and answer.status not in (408, 425, 429)
            raise ServerError(f"status {answer.status}: {text!r}", certain=certain)
        if len(content) > most_bytes:
            raise ServerError(f"answered more than {most_bytes} bytes")
        if answer.length:
            raise ServerError("the connection broke within the answer")
        return content
    except (OSError, http.client.HTTPException) as error:
        if expired.is_set() or isinstance(error, TimeoutError):
            raise ServerError(f"no answer within {timeout:g} s", timeout=True) from None
        raise ServerError(f"{type(error).__name__}: {error}".rstrip(": ")) from None
    finally:
        clock.cancel()
        connection.close()


def read_answer(content: bytes, count: int) -> tuple[dict[str, list[float]], list[str | None]]:
    """The lists of numbers in an answer, "rewards" among them, and each completion's fault if the server names any;
    what else it holds is left out.

    Raises:
      ServerError: it is no JSON object, or a list of rewards is of another length or holds what is no finite number.
    """
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError):
        raise ServerError(f"the answer is not JSON: {content[:80]!r}") from None
    if not isinstance(answer, dict) or "rewards" not in answer:
        raise ServerError(f"the answer has no 'rewards': {content[:80]!r}")
    found = {}
    for key, column in answer.items():
        if key != "rewards" and not (key.endswith("_rewards") and key.isascii() and key.isidentifier()):
            continue
        if not isinstance(column, list) or len(column) != count:
            size = f"{len(column)} values" if isinstance(column, list) else type(column).__name__
            raise ServerError(f"{key!r} holds {size} for {count} completions")
        found[key] = [_number(value, key) for value in column]
    faults = answer.get("faults")
    if not isinstance(faults, list) or len(faults) != count or not all(kind in _FAULTS for kind in faults):
        faults = [None] * count  # another server's own business
    return found, faults


def _number(value: Any, key: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, int | float) else float(value)
    except OverflowError:
        number = math.nan
    if not math.isfinite(number):
        raise ServerError(f"{key!r} holds {str(value)[:40]!r}, which is no finite number")
    return number


def _parts(groups: Sequence[Group]) -> Iterator[list[Group]]:
    """Whole groups in order, in parts for one request each."""
    part: list[Group] = []
    for group in groups:
        if part and sum(len(g.texts) for g in part) + len(group.texts) > COMPLETIONS_PER_REQUEST:
            yield part
            part = []
        part.append(group)
    if part:
        yield part
