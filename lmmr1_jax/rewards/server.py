"""The verifier as a service, with LMM-R1's contract.

    python -m lmmr1_jax.rewards.server --port 5000

    POST /get_reward {"query": [...], "prompts": [...], "labels": [...]}
    -> {"rewards": [1.5], "format_rewards": [1.0], "acc_rewards": [1.0], "faults": [null]}

A query is a prompt and what the model wrote, as one text; `prompts` (optional) tell where the one ends and the other
begins. `verifiers` (optional) names the verifier of each item. What hangs or kills its judge earns 0 and is named in
`faults`; the other items of its request, and all other requests, are answered as if it weren't there.

Whatever comes in is bounded: the bytes and items of a request, the seconds that its body may take, and the requests and
bytes held at a time; what is too much is refused with status 413, 408 or 503 before it is read further. Nothing here
imports jax.
"""

# Annotations are evaluated here: FastAPI reads those of its handlers, whose classes are imported within a function.
import asyncio
import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator
from typing import Any

from lmmr1_jax.config.schema import RewardsConfig
from lmmr1_jax.rewards.rules.assignment import check_name, read_name
from lmmr1_jax.rewards.rules.service import Verifier
from lmmr1_jax.rewards.workers.pool import Inbox
from lmmr1_jax.runtime.arguments import Parser, above_zero, count, finite, positive
from lmmr1_jax.runtime.cli import run_cli
from lmmr1_jax.runtime.errors import UserError

RESPONSE_STARTS = re.compile(
    r"<\|im_start\|>assistant\n|<｜Assistant｜>|<start_of_turn>model\n|<\|assistant\|>\n?|Assistant: "
)
"""Where the response begins in a query whose prompt isn't given: behind the first mark of a chat template."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the service takes on.

    Attributes:
      items: completions in one request.
      body_bytes: of one request.
      body_seconds: that a request's body may take to arrive.
      requests: held at a time.
      held_bytes: of all requests' bodies held at a time.
    """

    items: int = 1024
    body_bytes: int = 32 << 20
    body_seconds: float = 30.0
    requests: int = 512
    held_bytes: int = 128 << 20


class Refused(Exception):
    """A request that is not answered: an HTTP status and what is wrong, in a line."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def build_app(config: RewardsConfig, limits: Limits) -> Any:
    """The service as a FastAPI application; its workers live as long as the application runs.

    Raises:
      UserError: FastAPI is not installed.
    """
    try:
        from fastapi import FastAPI, Request
        from fastapi.responses import JSONResponse
        from starlette.requests import ClientDisconnect
    except ImportError:
        raise UserError("the reward server needs FastAPI and uvicorn: pip install 'lmmr1-jax[server]'") from None

    held = {"requests": 0, "bytes": 0}
    inbox = Inbox()
    verifier = Verifier(config)

    def serve() -> None:
        try:
            verifier.serve(inbox)
        except RuntimeError as error:
            if not closing.is_set():
                print(f"error: {error}", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGTERM)  # a service that judges nothing must not seem to be up

    closing = threading.Event()
    server = threading.Thread(target=serve, name="verifier")

    def end() -> None:
        """Requests that wait for a judge are answered at once, with 503."""
        closing.set()
        inbox.fail(RuntimeError("the server is ending"))

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        # Called by a signal's handler, which may interrupt whoever holds the inbox's lock.
        app.state.stop = lambda: loop.call_soon_threadsafe(end)
        server.start()
        yield
        end()
        verifier.close()  # with whatever still hangs
        server.join()

    app = FastAPI(title="lmmr1_jax reward server", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"workers": len(verifier.pids()), **held})

    @app.post("/get_reward")
    async def get_reward(request: Request) -> JSONResponse:
        if held["requests"] >= limits.requests:
            return refusal(503, "too many requests at a time")
        held["requests"] += 1
        body, size = bytearray(), 0
        try:
            async with asyncio.timeout(limits.body_seconds):
                async for chunk in request.stream():
                    body += chunk
                    size += len(chunk)
                    held["bytes"] += len(chunk)
                    if size > limits.body_bytes:
                        raise Refused(413, f"the body is longer than {limits.body_bytes} bytes")
                    if held["bytes"] > limits.held_bytes:
                        raise Refused(503, "too many bytes of requests at a time")
            items = read_items(body, config, limits.items)
            body.clear()  # its texts live on, and count until they are judged
            answers = [asyncio.wrap_future(inbox.submit(verifier.task(*item))) for item in items]
            rewards = [verifier.reward(answer) for answer in await asyncio.gather(*answers)]
        except TimeoutError:
            return refusal(408, f"the body took longer than {limits.body_seconds:g} s")
        except ClientDisconnect:
            return refusal(400, "the connection broke within the body")
        except Refused as refused:
            return refusal(refused.status, str(refused))
        except RuntimeError as error:
            return refusal(503, str(error))
        finally:
            held["requests"] -= 1
            held["bytes"] -= size
        return JSONResponse(
            {
                "rewards": [reward.total for reward in rewards],
                "format_rewards": [reward.parts["format"] for reward in rewards],
                "acc_rewards": [reward.parts["accuracy"] for reward in rewards],
                "faults": [reward.fault for reward in rewards],
            }
        )

    app.state.stop = lambda: None  # until it runs

    def refusal(status: int, message: str) -> JSONResponse:
        headers = {"Retry-After": "1"} if status == 503 else {"Connection": "close"}
        return JSONResponse({"error": message}, status, headers)

    return app


def read_items(body: bytearray, config: RewardsConfig, most: int) -> list[tuple[str, str, str, str]]:
    """(response, label, prompt, verifier) of every item of a request.

    Raises:
      Refused: with status 400 or 413, where the body is not what the contract says.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(400, "the body is not JSON") from None
    if not isinstance(request, dict):
        raise Refused(400, "the body is not a JSON object")
    columns = {key: request.get(key) for key in ("query", "labels", "prompts", "verifiers")}
    for key, column in columns.items():
        if column is None and key in ("prompts", "verifiers"):
            continue
        if not isinstance(column, list) or not all(isinstance(item, str) for item in column):
            raise Refused(400, f"{key!r} must be a list of texts")
        if len(column) != len(columns["query"]):
            raise Refused(400, f"{key!r} has {len(column)} items, but 'query' has {len(columns['query'])}")
    queries = columns["query"]
    if len(queries) > most:
        raise Refused(413, f"{len(queries)} items; at most {most} in one request")
    for name in set(columns["verifiers"] or ()):
        try:
            read_name(name)
        except UserError as error:
            raise Refused(400, str(error)) from None
    prompts = columns["prompts"] or [""] * len(queries)
    verifiers = columns["verifiers"] or [config.verifier] * len(queries)
    return [
        (response_in(query, prompt), label, query, name)
        for query, label, prompt, name in zip(queries, columns["labels"], prompts, verifiers, strict=True)
    ]


def response_in(query: str, prompt: str = "") -> str:
    """What the model wrote: all that follows the prompt, else what follows the chat template's mark, else all."""
    if prompt and query.startswith(prompt):
        return query[len(prompt) :]
    mark = RESPONSE_STARTS.search(query)
    return query[mark.end() :] if mark else query


def main(argv: list[str] | None = None) -> None:
    """The command."""
    defaults, rules = Limits(), RewardsConfig()
    flags = Parser(prog="python -m lmmr1_jax.rewards.server", description=__doc__.splitlines()[0], allow_abbrev=False)
    flags.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine alone)")
    flags.add_argument("--port", type=count, default=5000, help="0 takes a free one and says which (default: 5000)")
    flags.add_argument("--variant", choices=("default", "lmm-r1"), default=rules.variant, help="rules (default)")
    flags.add_argument("--verifier", default=rules.verifier, help="where a request names none (default: math)")
    flags.add_argument("--accuracy-weight", type=finite, default=rules.accuracy_weight, help="of a right answer (1.0)")
    flags.add_argument("--format-weight", type=finite, default=rules.format_weight, help="of the right form (0.5)")
    flags.add_argument("--timeout", type=above_zero, default=rules.timeout, help="seconds per completion (5)")
    flags.add_argument("--workers", type=positive, default=os.cpu_count() or 2, help="processes (one per core)")
    flags.add_argument("--max-items", type=positive, default=defaults.items, help="completions in a request (1024)")
    flags.add_argument("--max-bytes", type=positive, default=defaults.body_bytes, help="of a request (33554432)")
    flags.add_argument("--max-requests", type=positive, default=defaults.requests, help="held at a time (512)")
    args = flags.parse_args(argv)
    try:
        check_name(args.verifier)
    except UserError as error:
        raise UserError(f"--verifier: {error}") from None
    limits = dataclasses.replace(
        defaults,
        items=args.max_items,
        body_bytes=args.max_bytes,
        requests=args.max_requests,
        held_bytes=max(defaults.held_bytes, args.max_bytes),
    )
    config = RewardsConfig(
        variant=args.variant,
        verifier=args.verifier,
        accuracy_weight=args.accuracy_weight,
        format_weight=args.format_weight,
        timeout=args.timeout,
        workers=args.workers,
    )
    try:
        import uvicorn
    except ImportError:
        raise UserError("the reward server needs FastAPI and uvicorn: pip install 'lmmr1-jax[server]'") from None
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    try:
        listener = socket.create_server((args.host, args.port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen at {args.host} port {args.port}: {error}") from None
    app = build_app(config, limits)
    # Connections that say nothing are held too, in bounded number; h11 bounds their headers.
    settings = uvicorn.Config(
        app, log_level="warning", http="h11", limit_concurrency=4 * limits.requests, timeout_graceful_shutdown=5
    )
    host = f"[{args.host}]" if ":" in args.host else args.host
    print(f"listening at http://{host}:{listener.getsockname()[1]}/get_reward", flush=True)

    class Server(uvicorn.Server):
        def handle_exit(self, number: int, frame: Any) -> None:
            super().handle_exit(number, frame)
            app.state.stop()

    service = Server(settings)
    service.run(sockets=[listener])
    if not service.started:
        raise UserError("the server could not be started; what it says is above")


if __name__ == "__main__":
    run_cli(main)
