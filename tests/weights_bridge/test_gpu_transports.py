"""What of the GPU transports can be held to vLLM's own code without a GPU. The transfers themselves are not run."""

import concurrent.futures
import threading
import time
import types

import jax
import pytest
from random_checkpoint import config_of, random_tensors, table, write_checkpoint

from weights_bridge.errors import TransportError
from weights_bridge.load import load
from weights_bridge.stream import TensorStream
from weights_bridge.transports import nccl_library
from weights_bridge.transports.nccl import NcclTransport, chunks, init_info, together, update_info
from weights_bridge.vllm.cpu_compat.cuda_builds import tolerate

tolerate()
on_cpu = pytest.mark.skipif(jax.default_backend() == "gpu", reason="says what is missing where there is no GPU")
LIMIT = 8_000


@pytest.fixture
def stream(tmp_path) -> TensorStream:
    config = config_of("qwen2_5_vl", True)
    params = load(write_checkpoint(tmp_path, config, random_tensors(config)))
    return TensorStream(params, table(config), dtype="bfloat16", for_engines=True)


def test_chunks_hold_the_tensor_that_goes_over_the_limit():
    assert chunks([3, 4, 5, 1, 9, 2], 7) == [[0, 1, 2], [3, 4], [5]]
    assert chunks([7, 1, 1], 7) == [[0, 1], [2]]
    assert chunks([20], 7) == [[0]]


@pytest.mark.filterwarnings("ignore:Tensor .* exceeds")
@pytest.mark.parametrize("limit", [1, LIMIT, 1 << 30])
def test_chunks_are_cut_where_vllm_cuts_them(stream, limit):
    pytest.importorskip("vllm")
    from vllm.distributed.weight_transfer.packed_tensor import pack_tensors

    from weights_bridge.torch_view import as_tensor

    pairs = iter([(name, as_tensor(array)) for name, array in stream])
    theirs = []
    while (chunk := pack_tensors(pairs, lambda item: item[1], limit)) is not None:
        theirs.append((chunk.names, chunk.tensor_sizes))
    specs = stream.specs
    ours = chunks([spec.nbytes for spec in specs], limit)
    assert [([specs[n].name for n in chunk], [specs[n].nbytes for n in chunk]) for chunk in ours] == theirs


def test_vllm_takes_what_engines_are_told_and_gives_every_worker_a_rank_of_its_own(stream):
    pytest.importorskip("vllm")
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferInitInfo, NCCLWeightTransferUpdateInfo

    identifier = bytes(range(128))
    infos = [NCCLWeightTransferInitInfo(**init_info(identifier, index, 3, 2, LIMIT)) for index in range(3)]
    assert all(info.nccl_unique_id_bytes == identifier and info.world_size == 7 for info in infos)
    assert all(info.packed and info.packed_buffer_size_bytes == LIMIT for info in infos)
    # A worker's rank is its engine's offset and its own place; the learner is 0.
    assert [info.rank_offset + worker for info in infos for worker in range(2)] == [1, 2, 3, 4, 5, 6]
    update = NCCLWeightTransferUpdateInfo(**update_info(stream.specs))
    assert "lm_head.weight" in update.names
    assert set(update.dtype_names) == {"bfloat16"} and update.shapes[0] == [64, 24]


def test_a_packed_bucket_is_what_vllm_unpacks(stream):
    pytest.importorskip("vllm")
    import torch
    from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferInitInfo, IPCWeightTransferUpdateInfo
    from vllm.distributed.weight_transfer.packed_tensor import unpack_tensor

    from weights_bridge.torch_view import as_tensor
    from weights_bridge.transports import ipc

    assert IPCWeightTransferInitInfo(**ipc.INIT_INFO).packed
    limit = max(LIMIT, *(spec.nbytes for spec in stream.specs))
    buffer = torch.empty(limit, dtype=torch.uint8)
    came, buckets = {}, 0
    for specs in ipc.fill(buffer, stream, limit):
        info = IPCWeightTransferUpdateInfo(**ipc.update_info(specs, {"GPU-1": ()}))
        assert sum(info.tensor_sizes) <= limit
        dtypes = [getattr(torch, name) for name in info.dtype_names]
        packed = buffer[: sum(info.tensor_sizes)]
        unpacked = unpack_tensor(packed, info.names, info.shapes, dtypes, info.tensor_sizes)
        came |= {name: tensor.clone() for name, tensor in unpacked}
        buckets += 1
    assert buckets > 2
    expected = {name: as_tensor(array) for name, array in stream}
    assert came.keys() == expected.keys() and all(torch.equal(came[name], expected[name]) for name in came)


def test_a_missing_library_is_named_in_one_line(monkeypatch):
    monkeypatch.setattr(nccl_library, "_nccl_path", lambda: "libnccl-that-is-not-there.so.2")
    with pytest.raises(TransportError, match=r"^the nccl transport finds no libnccl.so.2; .*nvidia-nccl-cu13$"):
        nccl_library.Nccl()


@on_cpu
def test_a_learner_without_a_gpu_is_told_so():
    with pytest.raises(TransportError, match="the nccl transport (needs a learner on NVIDIA GPUs|finds no libnccl)"):
        NcclTransport(ranks_per_engine=1)
    pytest.importorskip("torch")
    from weights_bridge.transports.ipc import IpcTransport

    with pytest.raises(TransportError, match="the ipc transport needs a learner on an NVIDIA GPU, JAX has cpu"):
        IpcTransport()


def test_the_real_library_names_groups_and_its_errors_keep_their_words():
    try:
        library = nccl_library.Nccl()
    except TransportError:
        pytest.skip("no NCCL here; `pip install nvidia-nccl-cu13` brings it")
    first, second = library.unique_id(), library.unique_id()
    assert len(first) == len(second) == 128 and first != second
    if jax.default_backend() != "gpu":
        with pytest.raises(TransportError, match="^ncclCommInitRank: unhandled cuda error"):
            library.join(2, first, rank=0)


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray")
    if ray.is_initialized():  # by another test, which will also end it
        yield ray
        return
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.fixture
def engine(ray):
    """One that ends its part at once, later, never, or with an error."""

    @ray.remote(num_cpus=0, max_concurrency=8)
    class Engine:
        def update(self, seconds: float, error: str = "") -> None:
            time.sleep(seconds)
            if error:
                raise ValueError(error)

    actor = Engine.remote()
    ray.get(actor.update.remote(0))
    yield actor
    ray.kill(actor)


class Group:
    """The learner's part of a collective call: it returns when it is complete, and breaks when it is given up."""

    def __init__(self, seconds: float):
        self.seconds, self.broken = seconds, threading.Event()

    def work(self) -> None:
        if self.broken.wait(self.seconds):
            raise TransportError("aborted")


def test_all_is_well_when_learner_and_engines_end(engine):
    group = Group(0.1)
    calls = [engine.update.remote(0), engine.update.remote(0.3)]
    assert together(calls, group.work, group.broken.set, overdue=lambda: False) == {}
    assert not group.broken.is_set()


def test_when_an_engine_fails_the_group_is_given_up_and_those_that_wait_are_lost(engine):
    group = Group(600)
    calls = [engine.update.remote(0), engine.update.remote(600), engine.update.remote(0.2, "no such tensor")]
    since = time.monotonic()
    lost = together(calls, group.work, group.broken.set, overdue=lambda: False)
    assert time.monotonic() - since < 30 and group.broken.is_set()
    assert lost.keys() == {1, 2}
    assert "no such tensor" in str(lost[1]) and "no such tensor" in str(lost[2])


def test_an_engine_that_fails_when_all_is_sent_costs_no_other(engine):
    group = Group(0)
    calls = [engine.update.remote(1.0), engine.update.remote(0.2, "no such tensor")]
    assert together(calls, group.work, group.broken.set, overdue=lambda: False).keys() == {1}
    assert not group.broken.is_set()


def test_when_an_engine_dies_the_group_is_given_up(ray, engine):
    group = Group(600)
    calls = [engine.update.remote(600)]
    ray.kill(engine)
    assert together(calls, group.work, group.broken.set, overdue=lambda: False).keys() == {0}


def test_what_takes_too_long_is_given_up(engine):
    group, since = Group(600), time.monotonic()
    calls = [engine.update.remote(0), engine.update.remote(600)]
    lost = together(calls, group.work, group.broken.set, overdue=lambda: time.monotonic() - since > 1)
    assert lost.keys() == {1} and "in time" in str(lost[1])


def test_a_run_that_is_stopped_gives_the_group_up_and_does_not_wait_for_engines(engine):
    group, since = Group(600), time.monotonic()

    def check() -> None:
        if time.monotonic() - since > 0.5:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        together([engine.update.remote(600)], group.work, group.broken.set, overdue=lambda: False, check=check)
    assert time.monotonic() - since < 30 and group.broken.is_set()


def test_a_group_that_is_complete_only_when_it_was_given_up_takes_no_other_ones_place():
    complete, joining, aborted = threading.Event(), threading.Event(), []

    class Library:
        def join(self, *_, **__) -> str:
            joining.set()
            complete.wait(30)
            return "late"

        abort = aborted.append

    transport = object.__new__(NcclTransport)
    transport._cuda, transport._nccl = types.SimpleNamespace(use=lambda: None), Library()
    transport._members, transport._communicator, transport._groups_left = [], None, 0
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        late = thread.submit(transport._join, bytes(128), 2)
        joining.wait(30)
        transport._leave()
        transport._communicator = "the next one"
        complete.set()
        with pytest.raises(TransportError, match="given up"):
            late.result(30)
    assert transport._communicator == "the next one" and aborted == ["late"]


def test_when_the_learner_fails_its_reason_is_told(engine):
    def fail() -> None:
        raise MemoryError("no room for a chunk")

    group = Group(0)
    lost = together([engine.update.remote(600)], fail, group.broken.set, overdue=lambda: False)
    assert lost.keys() == {0} and "no room for a chunk" in str(lost[0])
    with pytest.raises(MemoryError):
        together([], fail, group.broken.set, overdue=lambda: False)
    assert group.broken.is_set()
