"""The learner's side of the `nccl` transport: from the learner's GPU to the engines' GPUs, through no host's memory.

The other side is vLLM's own `NCCLWeightTransferEngine` (backend "nccl"). The learner is rank 0 of a group and every
worker of every engine one of the ranks after it. They find each other by NCCL's unique id, which needs no torch here;
the first thing that they do together is to sum one number, as vLLM's workers do when they have joined. Then tensors
travel as bytes, packed into chunks whose boundaries both sides derive from the list of tensors.

This file was written from vLLM 0.32's source and checked against its classes as far as a machine without a GPU allows
(the chunks, what engines are told, the watch over them). The transfer itself has not been run yet.
"""

from __future__ import annotations

import base64
import concurrent.futures
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from weights_bridge.errors import TransportError
from weights_bridge.stream import TensorSpec, TensorStream
from weights_bridge.transports.nccl_library import Cuda, Nccl

_POLL_SECONDS = 0.05
_ABORT_SECONDS = 30.0


class NcclTransport:
    """Sends a stream of tensors into engines that run on NVIDIA GPUs, from a learner that does.

    Of the learner's GPU it takes a chunk of tensors and the memory in which they are packed: two buckets, a bucket
    being the setting or more by one tensor. A chunk is sent before the next one is made, so that XLA's collectives
    and these never wait for each other on one device. A group is joined anew when the engines are others than before;
    their workers then keep the memory of the old group until they end.

    Attributes:
      name: for the log.
      backend: the weight-transfer engine that vLLM must be told to use.
      owns_init: `send` initialises the engines; nobody else may.
    """

    name = "nccl"
    backend = "nccl"
    owns_init = True

    def __init__(
        self,
        *,
        ranks_per_engine: int,
        bucket_bytes: int = 256 << 20,
        timeout: float = 600.0,
        check: Callable[[], None] = lambda: None,
    ):
        """
        Args:
          ranks_per_engine: workers of an engine: its tensor parallelism.
          bucket_bytes: a chunk ends with the tensor that takes it over this size.
          timeout: seconds without progress after which all engines count as lost.
          check: called again and again while engines are waited for; what it raises ends the sending.

        Raises:
          TransportError: the learner is not on NVIDIA GPUs, or there is no NCCL.
        """
        self._ranks, self._bucket_bytes, self._timeout, self._check = ranks_per_engine, bucket_bytes, timeout, check
        self._nccl = Nccl()
        if jax.default_backend() != "gpu":
            raise TransportError(f"the nccl transport needs a learner on NVIDIA GPUs, JAX has {jax.default_backend()}")
        self._device = jax.local_devices()[0]
        self._cuda = Cuda(self._device.local_hardware_id)
        self._members: list[Any] = []
        self._communicator: Any = None
        self._groups_left = 0
        self._progress = 0.0

    @property
    def stream_bytes(self) -> int:
        """What a stream's `bucket_bytes` must be; its buckets are not used."""
        return self._bucket_bytes

    def send(self, stream: TensorStream, engines: Sequence[Any]) -> dict[int, BaseException]:
        """Every tensor to every engine, which must have begun an update.

        Args:
          stream: the tensors.
          engines: Ray handles with the methods `initialise(init_info)` and `update(update_info)`.

        Returns:
          The engines, by their place in `engines`, that did not take everything, and why. Their workers may wait in
          NCCL for ever and must be ended. The others have it all.
        """
        if [id(engine) for engine in engines] != [id(engine) for engine in self._members]:
            self._leave()
            identifier = self._nccl.unique_id()
            lost = self._together(
                [
                    engine.initialise.remote(
                        init_info(identifier, index, len(engines), self._ranks, self._bucket_bytes)
                    )
                    for index, engine in enumerate(engines)
                ],
                lambda: self._join(identifier, 1 + self._ranks * len(engines)),
            )
            if lost:
                # Nobody has the weights, not even who joined before the group broke.
                broke = TransportError(f"the group broke: {next(iter(lost.values()))}")
                return {place: lost.get(place, broke) for place in range(len(engines))}
            self._members = list(engines)
        info = update_info(stream.specs)
        return self._together([engine.update.remote(info) for engine in engines], lambda: self._broadcast(stream))

    def _together(self, calls: Sequence[Any], work: Callable[[], None]) -> dict[int, BaseException]:
        self._progress = time.monotonic()
        return together(
            calls,
            work,
            self._leave,
            overdue=lambda: time.monotonic() - self._progress > self._timeout,
            check=self._check,
        )

    def _join(self, identifier: bytes, world_size: int) -> None:
        self._cuda.use()
        left = self._groups_left
        communicator = self._nccl.join(world_size, identifier, rank=0)
        if left != self._groups_left:  # too late: it was given up, and another group may be in its place
            self._nccl.abort(communicator)
            raise TransportError("the group was complete only when it had been given up")
        self._communicator = communicator
        one = jax.block_until_ready(jnp.zeros(1, jnp.float32, device=self._device))
        self._nccl.sum_one(one.unsafe_buffer_pointer(), communicator, self._cuda.stream)
        self._cuda.synchronize()

    def _broadcast(self, stream: TensorStream) -> None:
        self._cuda.use()
        sizes = [spec.nbytes for spec in stream.specs]
        planned = chunks(sizes, self._bucket_bytes)
        room = max(sum(sizes[number] for number in chunk) for chunk in planned)
        # JAX knows of it, so that it is not taken from under JAX's feet, but never looks into it.
        packed = jax.block_until_ready(jnp.zeros(room, jnp.uint8, device=self._device))
        tensors = stream.on_device()
        for chunk in planned:
            arrays = [array for _, array in (next(tensors) for _ in chunk)]
            jax.block_until_ready(arrays)
            end = 0
            for array in arrays:
                self._cuda.copy(packed.unsafe_buffer_pointer() + end, array.unsafe_buffer_pointer(), array.nbytes)
                end += array.nbytes
            self._nccl.broadcast(packed.unsafe_buffer_pointer(), end, self._communicator, self._cuda.stream)
            # Until here the arrays are read.
            self._cuda.synchronize()
            del arrays
            self._progress = time.monotonic()

    def _leave(self) -> None:
        """Ends the group; whoever waits in it gets an error."""
        self._groups_left += 1
        self._members, communicator, self._communicator = [], self._communicator, None
        if communicator is not None:
            self._nccl.abort(communicator)


def init_info(identifier: bytes, index: int, engines: int, ranks: int, bucket_bytes: int) -> dict[str, Any]:
    """What vLLM's `init_weight_transfer_engine` must be told for engine `index`, of `ranks` workers like the others."""
    return {
        "nccl_unique_id_b64": base64.b64encode(identifier).decode(),
        "rank_offset": 1 + index * ranks,
        "world_size": 1 + engines * ranks,
        "packed": True,
        "packed_buffer_size_bytes": bucket_bytes,
        "packed_num_buffers": 2,
    }


def update_info(specs: Iterable[TensorSpec]) -> dict[str, Any]:
    """What vLLM's `update_weights` must be told of the tensors that come."""
    specs = list(specs)
    return {
        "names": [spec.name for spec in specs],
        "dtype_names": [spec.dtype.name for spec in specs],
        "shapes": [list(spec.shape) for spec in specs],
    }


def chunks(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """The places of tensors that travel together, as vLLM cuts them: the one that goes over the limit is included.

    Args:
      sizes: bytes of each tensor.
      limit: of a chunk, bytes.
    """
    cut: list[list[int]] = [[]]
    held = 0
    for number, size in enumerate(sizes):
        if held > limit:
            cut.append([])
            held = 0
        cut[-1].append(number)
        held += size
    return cut


def together(
    calls: Sequence[Any],
    work: Callable[[], None],
    give_up: Callable[[], None],
    overdue: Callable[[], bool],
    check: Callable[[], None] = lambda: None,
) -> dict[int, BaseException]:
    """Does the learner's part of something that needs all, and watches that nobody waits for ever.

    Args:
      calls: references to Ray calls, one an engine, that return when the engine's part is done.
      work: the learner's part; it may block on the engines, and runs in a thread.
      give_up: makes `work` end with an error; called when a call fails or `overdue` says so.
      overdue: whether it has taken too long.
      check: called again and again; what it raises gives up and is not caught.

    Returns:
      The calls that did not end well, by their place, and why. When one fails before the learner is through, or the
      learner does, so do all that have not ended: they wait for it.

    Raises:
      BaseException: what `work` raised when all calls had ended well, or what `check` raised.
    """
    import ray

    done: concurrent.futures.Future[None] = concurrent.futures.Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="weights", daemon=True).start()
    places = {call: place for place, call in enumerate(calls)}
    failed: dict[int, BaseException] = {}

    def own_error() -> BaseException | None:
        return done.exception() if done.done() else None

    # Once the learner is through, nobody waits for an engine that fails.
    while (places or not done.done()) and (done.done() or not failed) and own_error() is None and not overdue():
        try:
            check()
        except BaseException:
            give_up()
            raise
        if places:
            ready, _ = ray.wait(list(places), num_returns=1, timeout=_POLL_SECONDS)
        else:
            ready, _ = [], concurrent.futures.wait([done], timeout=_POLL_SECONDS)
        for call in ready:
            place = places.pop(call)
            try:
                ray.get(call)
            except Exception as error:
                failed[place] = error
    own = own_error()
    if done.done() and own is None and not places:
        return failed
    give_up()
    concurrent.futures.wait([done], timeout=_ABORT_SECONDS)
    own = own or TransportError("the engines did not take their weights in time")
    if not failed and not places:
        raise own
    reason = next(iter(failed.values()), own)
    return {place: TransportError(f"the group broke: {reason}") for place in places.values()} | failed
