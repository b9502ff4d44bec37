"""Loading: what a checkpoint holds arrives bit for bit, and what does not fit is named."""

import json
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from random_checkpoint import CASES, bfloat16, config_of, random_tensors, renamed, table, write_checkpoint

from weights_bridge.errors import CheckpointError
from weights_bridge.load import load, source_dtypes
from weights_bridge.tensor_table import leaves, logical_axes, lookup, nest


def flat(params) -> dict:
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def assert_equal_trees(a, b):
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, bfloat16])
@pytest.mark.parametrize(("kind", "tied"), CASES)
def test_every_leaf_is_its_tensors_reshaped_and_transposed(tmp_path, kind, tied, dtype):
    config = config_of(kind, tied)
    tensors = random_tensors(config, dtype)
    params = load(write_checkpoint(tmp_path, config, tensors))
    kernel = np.asarray(params["language"]["layers"]["gate"]["kernel"])
    assert kernel.dtype == np.float32 and kernel.shape == (3, 24, 40)
    np.testing.assert_array_equal(kernel[1], tensors["model.layers.1.mlp.gate_proj.weight"].T.astype(np.float32))
    assert ("head" in params["language"]) is not tied
    if kind == "qwen2":
        assert "vision" not in params
        return
    fused = tensors["visual.blocks.1.attn.qkv.weight"].astype(np.float32)
    leaf = np.asarray(params["vision"]["blocks"]["qkv"]["kernel"])[1]
    for part, rows in enumerate(np.split(fused, 3)):
        np.testing.assert_array_equal(leaf[:, part], rows.T)
    patch = tensors["visual.patch_embed.proj.weight"].astype(np.float32)
    np.testing.assert_array_equal(params["vision"]["patch"]["kernel"], patch.reshape(16, 1176).T)


def test_leaf_order_shapes_and_axes_agree_with_each_other():
    for kind, tied in CASES:
        entries = table(config_of(kind, tied))
        for path, leaf in leaves(entries).items():
            assert len(leaf.shape) == len(leaf.axes), path
            assert lookup(logical_axes(entries), path) == leaf.axes
            stacked = leaf.entries[0].layer is not None
            assert (leaf.axes[0] == "layers") is stacked
            assert [e.layer for e in leaf.entries] == (list(range(leaf.shape[0])) if stacked else [None])
        assert len({e.hf_name for e in entries}) == len(entries)


def test_transforms_are_views_so_that_only_the_slices_asked_for_are_read():
    for entry in table(config_of("qwen2_5_vl", False)):
        source = np.arange(np.prod(entry.shape), dtype=np.float32).reshape(entry.shape)
        leaf = entry.transform.to_leaf(source)
        assert np.shares_memory(leaf, source), entry.hf_name
        np.testing.assert_array_equal(entry.transform.to_source(leaf, entry.shape), source)


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
def test_both_spellings_of_names_and_of_configs_load_the_same(tmp_path, kind):
    config = config_of(kind, False)
    tensors = random_tensors(config)
    above = ("tie_word_embeddings", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    text = {key: value for key, value in config.items() if isinstance(value, int) and key not in above}
    text["rope_parameters"] = config["rope_scaling"]
    new_config = {key: value for key, value in config.items() if key not in text and key != "rope_scaling"}
    new_config["text_config"] = text | {"model_type": f"{kind}_text"}
    old = load(write_checkpoint(tmp_path / "old", config, tensors))
    new = load(write_checkpoint(tmp_path / "new", new_config, renamed(tensors)))
    assert_equal_trees(old, new)
    assert set(source_dtypes(tmp_path / "new")) == set(renamed(tensors))


def test_shards_with_an_index_load_as_one_file_does(tmp_path):
    config = config_of("qwen2_5_vl", True)
    tensors = random_tensors(config)
    one = load(write_checkpoint(tmp_path / "one", config, tensors))
    assert_equal_trees(one, load(write_checkpoint(tmp_path / "three", config, tensors, shards=3)))


def test_a_mixture_of_dtypes_is_remembered_tensor_by_tensor(tmp_path):
    config = config_of("qwen2", True)
    tensors = random_tensors(config, bfloat16)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32)
    dtypes = source_dtypes(write_checkpoint(tmp_path, config, tensors))
    assert dtypes["model.norm.weight"] == "float32" and dtypes["model.embed_tokens.weight"] == "bfloat16"
    params = load(tmp_path)
    np.testing.assert_array_equal(params["language"]["norm"]["scale"], tensors["model.norm.weight"])


def test_a_tied_checkpoint_may_hold_its_head_only_if_it_is_the_embedding(tmp_path):
    config = config_of("qwen2", True)
    tensors = random_tensors(config)
    head = tensors["model.embed_tokens.weight"].copy()
    params = load(write_checkpoint(tmp_path / "same", config, tensors | {"lm_head.weight": head}))
    assert "head" not in params["language"]
    head[-1, -1] += 1
    with pytest.raises(CheckpointError, match="lm_head.weight differs from the embedding"):
        load(write_checkpoint(tmp_path / "other", config, tensors | {"lm_head.weight": head}))


def test_missing_unexpected_and_misshaped_tensors_are_all_listed(tmp_path):
    config = config_of("qwen2_vl", False)
    tensors = random_tensors(config)
    del tensors["model.layers.2.mlp.up_proj.weight"], tensors["lm_head.weight"]
    tensors["model.layers.7.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
    tensors["visual.merger.mlp.2.bias"] = np.zeros((25,), np.float32)
    with pytest.raises(CheckpointError) as caught:
        load(write_checkpoint(tmp_path, config, tensors))
    message = str(caught.value)
    assert "2 missing (model.layers.2.mlp.up_proj.weight, lm_head.weight)" in message
    assert "1 unexpected (model.layers.7.mlp.up_proj.weight)" in message
    assert "1 mis-shaped (visual.merger.mlp.2.bias [25] for [24])" in message
    assert "\n" not in message


def test_computed_rotary_buffers_of_old_checkpoints_are_passed_over(tmp_path):
    config = config_of("qwen2", False)
    tensors = random_tensors(config)
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    load(write_checkpoint(tmp_path, config, tensors | buffer))


def write(path, text: str | bytes):
    path.write_bytes(text.encode() if isinstance(text, str) else text)


FAULTS = {
    "no folder": (lambda f: f.rename(f.with_name("elsewhere")), "no such folder"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "half a config": (lambda f: write(f / "config.json", '{"model_type": "qw'), "not valid JSON"),
    "another model": (lambda f: write(f / "config.json", '{"model_type": "llama"}'), "supported: qwen2, qwen2_vl"),
    "a field gone": (lambda f: write(f / "config.json", '{"model_type": "qwen2"}'), "the field hidden_size is missing"),
    "a shard gone": (lambda f: (f / "model-00002-of-00002.safetensors").unlink(), "missing: model-00002-of-00002"),
    "an index cut": (lambda f: write(f / "model.safetensors.index.json", '{"weight'), "is not an index"),
    "no weights": (lambda f: [p.unlink() for p in f.glob("model*")], "neither model.safetensors nor"),
    "an empty shard": (lambda f: write(f / "model-00001-of-00002.safetensors", b""), "is cut short at 0 bytes"),
    "not safetensors": (lambda f: write(f / "model-00001-of-00002.safetensors", b"x" * 100), "not a safetensors file"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_checkpoint_gives_one_line_that_names_what_is_wrong(tmp_path, fault):
    config = config_of("qwen2", False)
    folder = write_checkpoint(tmp_path / "model", config, random_tensors(config), shards=2)
    spoil, words = FAULTS[fault]
    spoil(folder)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    message = str(caught.value)
    assert words in message and str(tmp_path) in message and "\n" not in message


@pytest.mark.parametrize("kept", [5, 200, 0.5, -1])
def test_a_half_written_file_is_told_from_a_whole_one_wherever_it_was_cut(tmp_path, kept):
    config = config_of("qwen2", True)
    file = write_checkpoint(tmp_path, config, random_tensors(config)) / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: kept if isinstance(kept, int) else int(len(whole) * kept)])
    with pytest.raises(CheckpointError, match="cut short"):
        load(tmp_path)


def test_an_unsupported_dtype_is_named(tmp_path):
    config = config_of("qwen2", True)
    tensors = random_tensors(config)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)
    with pytest.raises(CheckpointError, match="model.norm.weight has dtype I8"):
        load(write_checkpoint(tmp_path, config, tensors))


def test_a_leaf_missing_from_the_parameters_is_named():
    with pytest.raises(CheckpointError, match="no language/norm/scale"):
        lookup(nest({("language", "embed"): 1}), ("language", "norm", "scale"))


MEMORY_SCRIPT = """
    import sys, threading, time
    import jax, jax.numpy as jnp
    from weights_bridge.load import load

    def anonymous():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

    jax.block_until_ready(jnp.zeros(8))
    before = peak = anonymous()
    done = False

    def watch():
        global peak
        while not done:
            peak = max(peak, anonymous())
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    params = load(sys.argv[1])
    done = True
    watcher.join()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    print(before, max(peak, anonymous()), held)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_needs_no_more_anonymous_memory_than_it_holds_and_the_largest_tensor(tmp_path):
    config = config_of(
        "qwen2", True, hidden_size=512, intermediate_size=2048, num_hidden_layers=8, vocab_size=24_000
    )  # 44 M parameters
    tensors = random_tensors(config, bfloat16)
    folder = write_checkpoint(tmp_path, config, tensors)
    command = [sys.executable, "-c", textwrap.dedent(MEMORY_SCRIPT), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, peak, held = (int(word) for word in done.stdout.split())
    assert held == 4 * sum(tensor.size for tensor in tensors.values())
    largest = max(tensor.nbytes for tensor in tensors.values())
    slack = 8 << 20  # what Python and XLA allocate for themselves
    assert peak - before < held + largest + slack, json.dumps({"before": before, "peak": peak, "held": held})
