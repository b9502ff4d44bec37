"""A vLLM engine that is stepped by us: between two steps it takes requests, gives back groups, or changes weights.

Everything that touches vLLM happens in one thread, so nothing is ever half done when something else begins, and it
is known of every token which weights sampled it. No JAX here: this runs on machines that have none.
"""

from __future__ import annotations

import collections
import contextlib
import queue
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from pathlib import Path
from typing import Any

import numpy as np

from lmmr1_jax.rollout.engines.protocol import (
    EngineConfigError,
    EngineFailed,
    EngineSettings,
    GroupRequest,
    RequestRefused,
    SampledCompletion,
)
from lmmr1_jax.rollout.engines.vllm import build as vllm_build
from lmmr1_jax.rollout.engines.vllm.build import one_line
from weights_bridge.vllm.plugin import HOST_BACKEND
from weights_bridge.vllm.private import shut_down

IDLE_SECONDS = 0.2
"""How long an idle engine sleeps on its queue before it looks whether it was closed."""


class Engine:
    """The engine's thread, and what other threads may ask of it. Methods return futures.

    An update of the weights is `begin_update`, `receive` once a bucket, `finish_update`. Between begin and finish
    nothing is sampled. With `in_flight=False` the update waits until what is being sampled has ended, and what was not
    begun waits for the new weights; with `in_flight=True` completions stop where they are, keep their keys and values,
    and go on under the new weights.
    """

    def __init__(self, settings: EngineSettings, folder: Path):
        self._settings, self._folder = settings, folder
        self._commands: queue.Queue[tuple[Future, Callable[[], Any]]] = queue.Queue()
        self._closed = threading.Event()
        self._groups: dict[str, _Group] = {}
        self._waiting: collections.deque[_Group] = collections.deque()
        self._draining: tuple[Future, Callable[[], Any]] | None = None
        self._updating = False
        self._version: int | None = None
        self._asleep: set[str] = set()
        self._llm: Any = None
        self._failure: BaseException | None = None
        self._built: Future = Future()
        self._thread = threading.Thread(target=self._run, name="vllm", daemon=True)
        self._thread.start()

    @property
    def built(self) -> Future:
        """Done when the model is there; its weights are random until the first update."""
        return self._built

    def generate(self, request: GroupRequest) -> Future:
        """A future of the group's completions, in order: a list of `SampledCompletion`."""
        group = _Group(request, Future())

        def accept() -> None:
            if request.urgent:
                self._waiting.appendleft(group)
            else:
                self._waiting.append(group)

        self._ask(accept, fails=group.result)
        return group.result

    def initialise(self, info: dict[str, Any]) -> Future:
        """Tells the weight-transfer engine who the learner is; `EngineConfigError` where the two have other models."""
        # Other transports meet here, and what fails may be the other side: another engine can do better.
        compares = self._settings.backend == HOST_BACKEND

        def initialise() -> None:
            with _unfit() if compares else contextlib.nullcontext():
                self._llm.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": info})

        return self._ask(initialise)

    def begin_update(self, *, in_flight: bool) -> Future:
        """Stops sampling; done when the engine is ready to receive."""
        future: Future = Future()

        def begin() -> None:
            if in_flight or not self._running():
                self._begin(future)
            else:
                self._draining = (future, lambda: self._begin(future))

        self._ask(begin, fails=future)
        return future

    def receive(self, info: dict[str, Any]) -> Future:
        """One bucket."""
        return self._ask(lambda: self._llm.collective_rpc("update_weights", kwargs={"update_info": info}))

    def finish_update(self, version: int) -> Future:
        """From here on tokens carry `version`."""

        def finish() -> None:
            self._llm.collective_rpc("finish_weight_update")
            self._llm.set_weight_version(str(version))
            self._wake("kv_cache")
            if not self._groups:
                # Features and keys of the old weights. What is sampled meanwhile can't be reset under its feet; it
                # is kept apart by the version in its names, see `_schedule`.
                self._llm.reset_prefix_cache()
                self._llm.reset_mm_cache()
                self._llm.reset_encoder_cache()
            self._version, self._updating = version, False

        return self._ask(finish)

    def sleep(self) -> Future:
        """Gives the memory of weights and keys back; the next update wakes the engine. Only where settings say so."""

        def sleep() -> None:
            if self._settings.sleeps and not self._groups and not self._waiting:
                self._llm.sleep(level=2)
                self._asleep = {"weights", "kv_cache"}
                self._version = None

        return self._ask(sleep)

    def close(self) -> None:
        """Ends the thread and vLLM's processes."""
        self._closed.set()
        self._thread.join(timeout=30)

    def _ask(self, work: Callable[[], Any], fails: Future | None = None) -> Future:
        future: Future = Future()
        if self._failure is not None:
            (fails or future).set_exception(self._failure)
            return future
        if fails is not None:
            future.add_done_callback(lambda done: done.exception() and _set_exception(fails, done.exception()))
        self._commands.put((future, work))
        if self._failure is not None:  # it failed meanwhile, and may have looked through its commands already
            _set_exception(future, self._failure)
        return future

    def _run(self) -> None:
        try:
            self._llm = vllm_build.build(self._settings, self._folder)
            self._built.set_result(None)
            while not self._closed.is_set():
                self._run_commands()
                self._schedule()
                if self._groups and not self._updating:
                    self._step()
                if self._draining is not None and not self._running():
                    future, begin = self._draining
                    self._draining = None
                    with _failing(future):
                        begin()
        except BaseException as error:
            traceback.print_exc()
            self._fail(_as_failure(error))
        finally:
            if self._llm is not None:
                with contextlib.suppress(Exception):
                    shut_down(self._llm)

    def _run_commands(self) -> None:
        """All commands that have come; waits for one when there is nothing to sample."""
        can_begin = self._waiting and self._version is not None
        idle = self._updating or not (self._groups or can_begin)
        while True:
            try:
                future, work = self._commands.get(timeout=IDLE_SECONDS) if idle else self._commands.get_nowait()
            except queue.Empty:
                return
            idle = False
            with _failing(future):
                future.set_result(work())

    def _running(self) -> bool:
        return bool(self._groups)

    def _begin(self, future: Future) -> None:
        self._updating = True  # before all else: an engine that fails at it must not go on with what it has left
        self._wake("weights")
        self._llm.collective_rpc("start_weight_update")
        future.set_result(None)

    def _wake(self, tag: str) -> None:
        if tag in self._asleep:
            self._llm.wake_up(tags=[tag])
            self._asleep.discard(tag)

    def _schedule(self) -> None:
        """Hands to vLLM what it can begin at once. What waits, waits here: under which weights a request begins is
        then known, and its cached prefix and images can be named by them."""
        if self._updating or self._draining is not None or self._version is None:
            return
        busy = sum(group.unfinished for group in self._groups.values())
        while self._waiting:
            group = self._waiting[0]
            full = busy + group.sampled > self._settings.max_num_seqs
            if full and self._groups and not group.request.urgent:
                return
            self._waiting.popleft()
            try:
                self._llm.add_request(group.request.name, *self._prompt_and_params(group))
            except Exception as error:  # vLLM validates here; the request is at fault, not the engine
                group.result.set_exception(RequestRefused(f"vLLM refuses {group.request.name}: {one_line(error)}"))
                continue
            self._groups[group.request.name] = group
            busy += group.sampled

    def _prompt_and_params(self, group: _Group) -> tuple[dict[str, Any], Any]:
        import PIL.Image
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        request = group.request
        prompt: dict[str, Any] = {
            "prompt_token_ids": request.short_ids.tolist(),
            "cache_salt": f"weights-{self._version}",
        }
        if request.images:
            prompt["multi_modal_data"] = {"image": [PIL.Image.fromarray(pixels) for pixels in request.images]}
            names = [f"{request.name}-{number}-weights-{self._version}" for number in range(len(request.images))]
            prompt["multi_modal_uuids"] = {"image": names}
        params = SamplingParams(
            n=group.sampled,
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            max_tokens=request.max_new_tokens,
            # Our own end tokens, not those that vLLM would find in the folder. (`min_tokens` would do more than go on
            # past them: it takes their probability away.)
            ignore_eos=True,
            stop_token_ids=[] if request.ignore_ends else list(self._settings.end_ids),
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        return prompt, params

    def _step(self) -> None:
        for output in self._llm.step():
            group = self._groups.get(output.request_id)
            if group is None:
                continue
            if not group.checked:
                if not np.array_equal(output.prompt_token_ids, group.request.token_ids):
                    self._llm.abort_request([group.request.name])
                    del self._groups[group.request.name]
                    group.result.set_exception(RequestRefused(_other_prompt(group.request, output.prompt_token_ids)))
                    continue
                group.checked = True
            for part in output.outputs:
                group.add(part, self._version)
            if not group.unfinished:
                del self._groups[group.request.name]
                group.result.set_result(group.completions())

    def _fail(self, error: BaseException) -> None:
        self._failure = error
        if not self._built.done():
            self._built.set_exception(error)
        if self._draining is not None:
            _set_exception(self._draining[0], error)
        for group in [*self._groups.values(), *self._waiting]:
            _set_exception(group.result, error)
        while True:
            try:
                future, _ = self._commands.get_nowait()
            except queue.Empty:
                return
            _set_exception(future, error)


class _Group:
    """A request in the making: what has come of each completion so far."""

    def __init__(self, request: GroupRequest, result: Future):
        self.request, self.result = request, result
        self.checked = False
        # vLLM samples greedily once; all completions of the group are that one.
        self.sampled = request.completions if request.temperature > 0 else 1
        self._tokens: list[list[int]] = [[] for _ in range(self.sampled)]
        self._log_probs: list[list[float]] = [[] for _ in range(self.sampled)]
        self._versions: list[list[int]] = [[] for _ in range(self.sampled)]
        self._reasons: dict[int, str] = {}

    @property
    def unfinished(self) -> int:
        """Completions that go on."""
        return self.sampled - len(self._reasons)

    def add(self, part: Any, version: int | None) -> None:
        """What one step sampled for one completion."""
        tokens = list(part.token_ids)
        self._tokens[part.index] += tokens
        self._versions[part.index] += [version] * len(tokens)
        logprobs = part.logprobs
        for at in range(len(tokens)):
            # Flat storage: the sampled token stands first among the entries of its position.
            self._log_probs[part.index].append(logprobs.logprobs[logprobs.start_indices[at]])
        if part.finish_reason is not None:
            self._reasons[part.index] = part.finish_reason

    def completions(self) -> list[SampledCompletion]:
        """The finished group."""
        return [
            SampledCompletion(
                token_ids=np.asarray(self._tokens[index], np.int32),
                log_probs=np.asarray(self._log_probs[index], np.float32),
                finish_reason=self._reasons[index],
                policy_version=np.asarray(self._versions[index], np.int32),
            )
            for index in (number % self.sampled for number in range(self.request.completions))
        ]


@contextlib.contextmanager
def _failing(future: Future) -> Iterator[None]:
    """An error of a command belongs to who asked, and does not end the engine."""
    try:
        yield
    except Exception as error:
        _set_exception(future, _as_failure(error))


@contextlib.contextmanager
def _unfit() -> Iterator[None]:
    """What is refused inside would be refused again."""
    try:
        yield
    except Exception as error:
        raise EngineConfigError(one_line(error)) from error


def _as_failure(error: BaseException) -> EngineFailed:
    """What the fleet is told: an exception that it knows, on any machine."""
    return error if isinstance(error, EngineFailed) else EngineFailed(one_line(error))


def _set_exception(future: Future, error: BaseException) -> None:
    with contextlib.suppress(InvalidStateError):  # done already
        future.set_exception(error)


def _other_prompt(request: GroupRequest, ids: list[int]) -> str:
    sizes = ", ".join(f"{pixels.shape[1]}x{pixels.shape[0]}" for pixels in request.images)
    expected = len(request.token_ids)
    return f"{request.name}: vLLM makes {len(ids)} tokens of a prompt of {expected} (images: {sizes or 'none'})"
