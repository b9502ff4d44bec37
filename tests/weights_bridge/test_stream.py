"""The stream into engines: bit-equal from one device or from several processes, and never more of it than a bucket."""

import gc
import os
import socket
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_checkpoint import CASES, bfloat16, config_of, joined, random_tensors, same_bits, table, write_checkpoint

from weights_bridge import stream as stream_module
from weights_bridge.entries import Entry, Transform
from weights_bridge.load import load
from weights_bridge.stream import TensorStream, on_devices

TESTS = Path(__file__).parent.parent


@pytest.fixture
def as_accelerator(monkeypatch):
    """Has the CPU's device treated as one whose memory the host cannot read."""
    monkeypatch.setattr(stream_module, "_is_on_host", lambda leaf: False)


def test_a_stream_can_be_read_again_and_its_buckets_are_bounded(tmp_path):
    config = config_of("qwen2_vl", True)
    tensors = random_tensors(config)
    params = load(write_checkpoint(tmp_path, config, tensors))
    stream = TensorStream(params, table(config), bucket_bytes=8_000)
    assert len(stream) == len(tensors) and {spec.name for spec in stream.specs} == tensors.keys()
    for _ in range(2):
        assert same_bits(dict(stream), tensors)
        assert same_bits(joined(stream), tensors)
    assert max(spec.nbytes for spec in stream.specs) > 8_000
    buckets = [[(piece.name, piece.data.nbytes) for piece in bucket] for bucket in stream.buckets()]
    assert all(sum(size for _, size in bucket) <= 8_000 for bucket in buckets)
    names = [name for bucket in buckets for name, _ in bucket]
    assert list(dict.fromkeys(names)) == [spec.name for spec in stream.specs] and len(names) > len(stream)
    assert len(buckets) > 2


def expected_by_engines(tensors: dict, dtype) -> dict:
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    return {name: tensor.astype(dtype) for name, tensor in (tensors | {"lm_head.weight": head}).items()}


@pytest.mark.parametrize("dtype", [np.float32, bfloat16, np.float16])
@pytest.mark.parametrize(("kind", "tied"), CASES)
def test_engines_get_every_tensor_and_always_a_head_cast_as_numpy_casts(tmp_path, kind, tied, dtype):
    config = config_of(kind, tied)
    tensors = random_tensors(config)
    params = load(write_checkpoint(tmp_path, config, tensors))
    stream = TensorStream(params, table(config), dtype=dtype, bucket_bytes=1_000, for_engines=True)
    assert same_bits(joined(stream), expected_by_engines(tensors, dtype))
    came = dict(stream)
    assert same_bits(came, expected_by_engines(tensors, dtype))
    assert all(tensor.flags.c_contiguous for tensor in came.values())
    assert [(spec.name, spec.dtype, spec.shape) for spec in stream.specs] == [
        (name, tensor.dtype, tensor.shape) for name, tensor in came.items()
    ]


@pytest.mark.parametrize("dtype", [np.float32, bfloat16, np.float16])
@pytest.mark.parametrize(("kind", "tied"), CASES)
def test_tensors_made_on_the_device_have_the_bits_of_those_made_on_the_host(
    tmp_path, as_accelerator, kind, tied, dtype
):
    config = config_of(kind, tied)
    tensors = random_tensors(config)
    params = load(write_checkpoint(tmp_path, config, tensors))
    stream = TensorStream(params, table(config), dtype=dtype, bucket_bytes=1_000, for_engines=True)
    assert same_bits(joined(stream), expected_by_engines(tensors, dtype))
    assert same_bits(dict(stream), expected_by_engines(tensors, dtype))
    on_device = {name: np.asarray(tensor) for name, tensor in stream.on_device()}
    assert same_bits(on_device, expected_by_engines(tensors, dtype))


def test_a_tensor_moved_on_the_device_keeps_every_bit():
    bits = np.random.default_rng(0).integers(0, 2**32, (5, 7, 2, 3), np.uint32)
    transform = Transform((3, 7, 2), (1, 2, 0))
    stacked = jnp.asarray(bits.view(np.float32))
    for layer in range(5):
        entry = Entry("x", ("x",), layer, transform, (21, 2), (5, 7, 2, 3), (None,) * 4)
        moved = np.asarray(on_devices(stacked, entry, np.float32))
        np.testing.assert_array_equal(moved.view(np.uint32), transform.to_source(bits[layer], (21, 2)))


def test_all_layers_and_all_syncs_share_a_program_per_shape(tmp_path, as_accelerator, caplog):
    config = config_of("qwen2", True, num_hidden_layers=6, hidden_size=32)
    params = load(write_checkpoint(tmp_path, config, random_tensors(config)))
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for _ in range(2):
            for bucket in TensorStream(params, table(config), dtype=bfloat16, for_engines=True).buckets():
                del bucket
    compiled = [record for record in caplog.records if record.message.startswith("Compiling jit(tensor)")]
    # The embedding and its norm; two norms alike, two biases and three kernels of attention, three of the MLP.
    assert 5 <= len(compiled) <= 9, [record.message for record in compiled]


def test_the_stream_holds_one_bucket_of_device_memory_beyond_the_consumers(tmp_path, as_accelerator):
    config = config_of("qwen2_5_vl", False)
    params = load(write_checkpoint(tmp_path, config, random_tensors(config)))
    stream = TensorStream(params, table(config), dtype=bfloat16, bucket_bytes=8_000, for_engines=True)
    largest = max(spec.nbytes for spec in stream.specs)
    assert largest > 8_000
    own = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params)}

    def made() -> int:
        arrays = {array.unsafe_buffer_pointer(): array.nbytes for array in jax.live_arrays() if array.size > 1}
        return sum(size for pointer, size in arrays.items() if pointer not in own)

    gc.collect()
    before, beyond = made(), []
    for bucket in stream.buckets():
        del bucket
        beyond.append(made() - before)
    assert max(beyond) <= largest and beyond[0] > 0 and beyond[-1] == 0


def test_the_stream_holds_one_bucket_of_host_memory_and_none_twice(tmp_path):
    config = config_of("qwen2", False, hidden_size=128, intermediate_size=512, vocab_size=512)
    params = load(write_checkpoint(tmp_path, config, random_tensors(config)))
    stream = TensorStream(params, table(config), dtype=bfloat16, bucket_bytes=300_000, for_engines=True)
    total = sum(spec.nbytes for spec in stream.specs)
    assert total > 3 * 300_000
    tracemalloc.start()
    for bucket in stream.buckets():
        del bucket
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.2 * 300_000


def test_two_processes_stream_every_bit_of_what_neither_holds_whole(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
    }
    script = str(Path(__file__).with_name("two_processes.py"))
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), port, str(tmp_path)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for rank in range(2)
    ]
    try:
        out, error = processes[0].communicate(timeout=120)
        assert processes[0].returncode == 0, error[-3000:]
        _, error = processes[1].communicate(timeout=30)
        assert processes[1].returncode == 0, error[-3000:]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert out.strip().endswith("ok")
