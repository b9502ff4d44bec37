"""Exporting: what was loaded comes back bit for bit, from any devices, and a folder appears whole or not at all."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from random_checkpoint import CASES, bfloat16, config_of, random_tensors, renamed, same_bits, write_checkpoint
from safetensors.numpy import load_file

from lmmr1_jax.learner.checkpoint import Checkpoints
from lmmr1_jax.learner.state import POLICY, TrainableState, TrainState
from weights_bridge import export as export_module
from weights_bridge.errors import CheckpointError
from weights_bridge.export import export, export_checkpoint
from weights_bridge.load import load, read_stored, source_dtypes
from weights_bridge.run_checkpoint import copy_side_files, newest_step, read_orbax_params, step_folders
from weights_bridge.safetensors_file import write_file

SIDE_FILES = ("generation_config.json", "tokenizer.json", "preprocessor_config.json", "chat_template.jinja")


def stored_tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder, by the safetensors library."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, bfloat16])
@pytest.mark.parametrize(("kind", "tied"), CASES)
def test_load_then_export_gives_back_every_bit(tmp_path, kind, tied, dtype):
    config = config_of(kind, tied)
    tensors = random_tensors(config, dtype)
    # Numbers that careless casts lose: the largest, the smallest normal and subnormal ones, both zeros, infinity.
    limits = np.finfo(np.float16) if dtype is np.float16 else np.finfo(np.float32)
    odd = [0.0, -0.0, np.inf, limits.tiny, limits.tiny / 4, 60_000.0]
    tensors["model.embed_tokens.weight"][0, : len(odd)] = np.asarray(odd, np.float32).astype(dtype)
    source = write_checkpoint(tmp_path / "source", config, tensors)
    export(load(source), source, tmp_path / "out")
    assert same_bits(stored_tensors(tmp_path / "out"), tensors)
    for name in ("config.json", *SIDE_FILES):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_names_dtypes_and_a_tied_models_head_come_back_as_the_source_had_them(tmp_path):
    config = config_of("qwen2_5_vl", True)
    tensors = random_tensors(config, bfloat16)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors = renamed(tensors)
    source = write_checkpoint(tmp_path / "source", config, tensors, shards=2)
    export(load(source), source, tmp_path / "out")
    assert same_bits(stored_tensors(tmp_path / "out"), tensors)


def test_shards_stay_under_their_limit_and_the_index_names_every_tensor(tmp_path):
    config = config_of("qwen2_5_vl", False)
    tensors = random_tensors(config)
    source = write_checkpoint(tmp_path / "source", config, tensors)
    limit = 20_000
    export(load(source), source, tmp_path / "out", max_shard_bytes=limit)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for file in (tmp_path / "out").glob("*.safetensors"):
        inside = load_file(file)
        assert len(inside) == 1 or sum(tensor.nbytes for tensor in inside.values()) <= limit
        assert {name for name, place in index["weight_map"].items() if place == file.name} == inside.keys()
    assert same_bits(stored_tensors(tmp_path / "out"), tensors)
    assert load(tmp_path / "out").keys() == {"language", "vision"}


def test_another_dtype_is_rounded_once_and_said_in_the_config(tmp_path):
    config = config_of("qwen2", False)
    tensors = random_tensors(config)
    source = write_checkpoint(tmp_path / "source", config, tensors)
    export(load(source), source, tmp_path / "out", dtype="bfloat16")
    assert same_bits(stored_tensors(tmp_path / "out"), {n: t.astype(bfloat16) for n, t in tensors.items()})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_tensors_of_mixed_dtypes_are_aligned_for_readers_that_map_the_file(tmp_path):
    tensors = {"odd": np.ones(3, bfloat16), "wide": np.ones((2, 2), np.float32), "none": np.ones((0, 4), np.float16)}
    specs = [(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
    write_file(tmp_path / "mixed.safetensors", specs, iter(tensors.items()))
    assert same_bits(load_file(tmp_path / "mixed.safetensors"), tensors)
    length = int.from_bytes((tmp_path / "mixed.safetensors").read_bytes()[:8], "little")
    assert length % 8 == 0


def test_a_folder_in_use_is_refused_and_an_empty_one_is_taken(tmp_path):
    config = config_of("qwen2", True)
    source = write_checkpoint(tmp_path / "source", config, random_tensors(config))
    with pytest.raises(CheckpointError, match="is not empty"):
        export(load(source), source, source)
    (tmp_path / "empty").mkdir()
    export(load(source), source, tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").is_file()


def test_an_export_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    config = config_of("qwen2", True)
    source = write_checkpoint(tmp_path / "source", config, random_tensors(config))
    params = load(source)

    def full_disk(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module, "write_file", full_disk)
    with pytest.raises(OSError):
        export(params, source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_parameters_of_another_model_are_refused(tmp_path):
    config = config_of("qwen2", True)
    source = write_checkpoint(tmp_path / "a", config, random_tensors(config))
    other = config_of("qwen2", True, vocab_size=32)
    params = load(write_checkpoint(tmp_path / "b", other, random_tensors(other)))
    with pytest.raises(CheckpointError, match=r"language/embed/embedding is \[32, 24\], the config says \[64, 24\]"):
        export(params, source, tmp_path / "out")


DEVICES_SCRIPT = """
    import sys
    from pathlib import Path

    import jax
    import numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec
    from random_checkpoint import CASES, bfloat16, config_of, joined, random_tensors, same_bits, table, write_checkpoint
    from safetensors.numpy import load_file

    from weights_bridge.export import export
    from weights_bridge.tensor_table import leaves, lookup
    from weights_bridge.load import load
    from weights_bridge.stream import TensorStream

    assert jax.device_count() == 8
    RULES = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor", "vocab": "tensor", "vision_heads": "tensor",
             "vision_mlp": "tensor", "patch": "fsdp", "layers": "data"}
    for shape in ((1, 8, 1), (2, 2, 2), (1, 4, 2)):
        mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)

        def sharding(path, sizes, axes):
            names = [RULES.get(axis) for axis in axes]
            fits = [name if name and size % mesh.shape[name] == 0 else None for name, size in zip(names, sizes)]
            return NamedSharding(mesh, PartitionSpec(*fits))

        for kind, tied in CASES:
            for dtype in (np.float32, bfloat16):
                folder = Path(sys.argv[1]) / "-".join(map(str, (kind, tied, np.dtype(dtype).name, *shape)))
                config = config_of(kind, tied, num_hidden_layers=4)
                tensors = random_tensors(config, dtype)
                source = write_checkpoint(folder / "source", config, tensors)
                params, whole = load(source, sharding), load(source)
                split = 0
                for path, leaf in leaves(table(config)).items():
                    array, reference = lookup(params, path), np.asarray(lookup(whole, path))
                    assert array.sharding == sharding(path, leaf.shape, leaf.axes)
                    split += array.addressable_shards[0].data.size < array.size
                    for shard in array.addressable_shards:
                        np.testing.assert_array_equal(np.asarray(shard.data), reference[shard.index])
                assert split > 5, split
                export(params, source, folder / "out")
                assert same_bits(load_file(folder / "out" / "model.safetensors"), tensors), folder
                stream = TensorStream(params, table(config), dtype=dtype, bucket_bytes=1_000)
                assert same_bits(joined(stream), tensors), folder
    print("ok")
"""


def test_eight_devices_load_their_own_slices_and_export_every_bit(tmp_path):
    tests = Path(__file__).parent.parent
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)]),
    }
    command = [sys.executable, "-c", textwrap.dedent(DEVICES_SCRIPT), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "ok", done.stderr[-3000:]


@pytest.fixture
def run(tmp_path) -> tuple[Path, Path]:
    """A run's folder with the checkpoints 4 and 10, and the source that it started from."""
    config = config_of("qwen2_5_vl", False)
    source = write_checkpoint(tmp_path / "source", config, random_tensors(config, bfloat16))
    run = tmp_path / "run"
    copy_side_files(source, run / "model")
    params = load(source)
    checkpoints = Checkpoints(run / "checkpoints", keep=5)
    for step in (4, 10):
        changed = jax.tree.map(lambda leaf, step=step: leaf + step, params)
        trained = {POLICY: TrainableState(changed, optax.ScaleByAdamState(jnp.int32(step), changed, changed))}
        checkpoints.save(step, TrainState(trained, jnp.int32(step), jnp.int32(0)), {"cursor": step})
    checkpoints.close()
    return run, source


def test_a_runs_newest_whole_checkpoint_is_exported_and_half_written_ones_are_not(run, tmp_path):
    run, source = run
    (run / "checkpoints" / "11.orbax-checkpoint-tmp-3" / "state").mkdir(parents=True)
    (run / "checkpoints" / "12" / "state").mkdir(parents=True)
    (run / "checkpoints" / "12" / "state" / "manifest.ocdbt").write_bytes(b"half")
    assert newest_step(run).name == "10" and list(step_folders(run / "checkpoints")) == [4, 10]
    expected = {
        name: (tensor.astype(np.float32) + 10).astype(tensor.dtype) for name, tensor in stored_tensors(source).items()
    }
    export_checkpoint(run, tmp_path / "newest")
    assert same_bits(stored_tensors(tmp_path / "newest"), expected)
    export_checkpoint(run / "checkpoints", tmp_path / "also newest")
    assert same_bits(stored_tensors(tmp_path / "also newest"), expected)
    for name in ("config.json", *SIDE_FILES):
        assert (tmp_path / "newest" / name).read_bytes() == (source / name).read_bytes()
    assert not (tmp_path / "newest" / "source_dtypes.json").exists()


def test_one_checkpoint_of_a_run_is_exported_in_its_master_dtype(run, tmp_path):
    run, source = run
    export_checkpoint(run / "checkpoints" / "4", tmp_path / "out", dtype="float32")
    expected = {name: tensor.astype(np.float32) + 4 for name, tensor in stored_tensors(source).items()}
    assert same_bits(stored_tensors(tmp_path / "out"), expected)


def test_only_the_parameters_of_a_checkpoint_are_read(run):
    params = read_orbax_params(run[0] / "checkpoints" / "10")
    assert params.keys() == {"language", "vision"}
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))


def command_line(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "weights_bridge.export", *arguments]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent.parent)}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


def test_a_spoilt_checkpoint_is_named_in_one_line_of_error(run):
    run, _ = run
    (run / "checkpoints" / "10" / "state" / "manifest.ocdbt").write_bytes(b"half")
    done = command_line(run.parent, "--checkpoint", "run", "--out", "out")
    # After a failed read TensorStore's threads may print of Orbax's closed event loop, which nothing of ours can catch.
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and "checkpoints/10: its parameters cannot be read" in line
    whole = command_line(run.parent, "--checkpoint", "run/checkpoints/4", "--out", "out")
    assert whole.returncode == 0 and not whole.stderr, whole.stderr


def test_the_side_files_of_a_run_can_be_copied_on(run, tmp_path):
    copy_side_files(run[0] / "model", tmp_path / "again")
    assert (tmp_path / "again" / "source_dtypes.json").read_text() == (
        run[0] / "model" / "source_dtypes.json"
    ).read_text()
    assert source_dtypes(run[1]) == json.loads((tmp_path / "again" / "source_dtypes.json").read_text())


def test_a_hugging_face_folder_is_exported_as_it_is(tmp_path):
    config = config_of("qwen2_vl", True)
    tensors = random_tensors(config, bfloat16)
    source = write_checkpoint(tmp_path / "source", config, tensors, shards=3)
    export_checkpoint(source, tmp_path / "out")
    assert same_bits(stored_tensors(tmp_path / "out"), tensors)
    assert {name: t.dtype for name, t in read_stored(tmp_path / "out").items()} == {
        name: t.dtype for name, t in tensors.items()
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "x"], "--checkpoint"),
        (["--checkpoint", "nowhere", "--out", "x"], "nowhere: no such folder"),
        (["--checkpoint", "nowhere", "--out", "x", "--dtype", "int8"], "invalid choice"),
        (["--checkpoint", ".", "--out", "x"], "is neither a run's folder, nor"),
        (["--checkpoint", "started", "--out", "x"], "no whole checkpoint yet"),
    ],
)
def test_wrong_arguments_give_one_line_and_status_2(tmp_path, arguments, words):
    (tmp_path / "started" / "checkpoints").mkdir(parents=True)
    done = command_line(tmp_path, *arguments)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
