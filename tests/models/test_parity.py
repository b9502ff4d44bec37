"""Logits of every supported model against transformers, float32, to 1e-4; packed rows against separate sequences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import oracle  # noqa: E402

from lmmr1_jax.models.attention.mask import KeyIntervals, causal_intervals  # noqa: E402
from lmmr1_jax.models.network import build  # noqa: E402
from lmmr1_jax.models.positions import prompt_positions  # noqa: E402
from lmmr1_jax.models.vision_batch import pack_images  # noqa: E402
from weights_bridge.config_json import read_architecture  # noqa: E402

SLOTS = 512
VISION_ROWS = 2
LENGTH = 256
TOLERANCE = 1e-4


@functools.cache
def network_and_params(folder, remat="none"):
    network = build(read_architecture(folder), remat=remat)
    params = oracle.flax_params(oracle.load_model(folder))
    shapes = jax.tree.map(lambda leaf: leaf.shape, params)
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, network.abstract_params)
    return network, jax.tree.map(jnp.asarray, params)


@functools.cache
def compiled(network_id):
    network = _networks[network_id]

    @jax.jit
    def logits(params, tokens, positions, low, high, image_slots, vision):
        model = network.bind(params)
        features = None if vision is None else model.encode_images(vision)
        hidden = model.hidden(model.embed(tokens, image_slots, features), positions, KeyIntervals(low, high))
        return hidden @ model.head_embedding().T

    return logits


_networks = {}


def logits_of(folder, row, patches=(), grids=()):
    """Our logits of one row: a dict of tokens [L], positions [3, L], low [L], high [L], padded to LENGTH."""
    network, params = network_and_params(folder)
    _networks[id(network)] = network
    length = len(row["tokens"])
    vision, slots = None, np.full(LENGTH, -1, np.int32)
    if network.config.vision is not None:
        vision, token_slots = pack_images(
            list(zip(patches, grids, strict=True)), network.config.vision, slots=SLOTS, rows=VISION_ROWS
        )
        ids = np.asarray(row["tokens"])
        is_vision = (ids == network.config.image_token_id) | (ids == network.config.video_token_id)
        slots[np.flatnonzero(is_vision)] = np.concatenate([*token_slots, []])

    def padded(array):
        array = np.asarray(array, np.int32)
        return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, LENGTH - length)])

    out = compiled(id(network))(
        params,
        padded(row["tokens"])[None],
        padded(row["positions"])[:, None],
        padded(row["low"])[None],
        padded(row["high"])[None],
        slots[None],
        vision,
    )
    return np.asarray(out[0, :length])


def plain_row(folder, tokens, grids, **seconds):
    positions, _ = prompt_positions(tokens, grids, network_and_params(folder)[0].config, **seconds)
    return dict(tokens=tokens, positions=positions, low=np.arange(len(tokens)), high=np.full(len(tokens), len(tokens)))


def interleaved(grids, token="<|image_pad|>", seed=0):
    tokens = oracle.text_tokens(5, seed)
    for i, grid in enumerate(grids):
        tokens += oracle.vision_span(grid, token) + oracle.text_tokens(3 + i, seed + i + 1)
    return tokens


IMAGES = {
    "one window exactly": [(1, 8, 8)],
    "a single token": [(1, 2, 2)],
    "odd sizes": [(1, 6, 10)],
    "wide": [(1, 2, 34)],
    "several": [(1, 10, 18), (1, 2, 2), (1, 12, 6)],
    "frames": [(3, 6, 10)],
}


@pytest.mark.parametrize("tied", [True, False])
def test_text_logits_equal_transformers(tied):
    for kind in oracle.KINDS:
        folder = oracle.random_model(kind, tied)
        tokens = oracle.text_tokens(70, 1)
        ours = logits_of(folder, plain_row(folder, tokens, []))
        theirs = oracle.hf_logits(oracle.load_model(folder), tokens)
        assert np.abs(ours - theirs).max() < TOLERANCE, kind


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("tied", [True, False])
def test_image_logits_equal_transformers(kind, tied):
    folder = oracle.random_model(kind, tied)
    for name, grids in IMAGES.items():
        tokens, patches = interleaved(grids), oracle.random_patches(grids)
        ours = logits_of(folder, plain_row(folder, tokens, grids), patches, grids)
        theirs = oracle.hf_logits(oracle.load_model(folder), tokens, patches=patches, grids=grids)
        assert np.abs(ours - theirs).max() < TOLERANCE, name
        blind = logits_of(folder, plain_row(folder, tokens, grids), [0 * p for p in patches], grids)
        assert np.abs(blind - theirs).max() > 0.01, f"{name}: the image makes no difference"


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
def test_video_logits_equal_transformers(kind):
    folder = oracle.random_model(kind)
    grids = [(4, 6, 4), (2, 8, 10)]
    tokens, patches = interleaved(grids, "<|video_pad|>"), oracle.random_patches(grids)
    seconds = [1.5, 0.7] if kind == "qwen2_5_vl" else None
    row = plain_row(folder, tokens, grids, second_per_grid_ts=seconds)
    theirs = oracle.hf_logits(
        oracle.load_model(folder), tokens, video_patches=patches, video_grids=grids, second_per_grid_ts=seconds
    )
    assert np.abs(logits_of(folder, row, patches, grids) - theirs).max() < TOLERANCE


@pytest.mark.parametrize("blocks", [(0,), (3,), (0, 2), (0, 1, 2, 3), ()])
def test_any_pattern_of_window_and_full_layers_equals_transformers(blocks):
    folder = oracle.random_model("qwen2_5_vl", vision={"fullatt_block_indexes": list(blocks), "window_size": 84})
    grids = [(1, 10, 14)]
    tokens, patches = interleaved(grids), oracle.random_patches(grids)
    row = plain_row(folder, tokens, grids)
    network, _ = network_and_params(folder)
    slots = 14 * network.config.vision.window_slots
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("test_parity.SLOTS", slots)
        ours = logits_of(folder, row, patches, grids)
    theirs = oracle.hf_logits(oracle.load_model(folder), tokens, patches=patches, grids=grids)
    assert np.abs(ours - theirs).max() < TOLERANCE


def shared_prefix_row(folder, groups):
    """One row of (prompt tokens, grids, completions): prompts once, completions behind, positions going on."""
    parts, where = {k: [] for k in ("tokens", "positions", "high")}, []
    config = network_and_params(folder)[0].config
    for prompt, grids, completions in groups:
        positions, following = prompt_positions(prompt, grids, config)
        start = len(parts["tokens"])
        parts["tokens"] += list(prompt)
        parts["positions"].append(positions)
        parts["high"] += [start + len(prompt) + sum(map(len, completions))] * len(prompt)
        for completion in completions:
            where.append((start, len(prompt), len(parts["tokens"]), len(completion)))
            parts["tokens"] += list(completion)
            parts["positions"].append(np.tile(following + np.arange(len(completion)), (3, 1)))
            parts["high"] += [len(parts["tokens"])] * len(completion)
    parts["positions"] = np.concatenate(parts["positions"], 1)
    return parts | {"low": np.arange(len(parts["tokens"]))}, where


@pytest.mark.parametrize("kind", oracle.KINDS)
def test_packed_rows_that_share_a_prompt_equal_separate_sequences_in_transformers(kind):
    folder = oracle.random_model(kind)
    model = oracle.load_model(folder)
    grids = [] if kind == "qwen2" else [(1, 6, 10), (1, 4, 4)]
    patches = oracle.random_patches(grids)
    groups = [
        (interleaved(grids), grids, [oracle.text_tokens(n, 10 + n) for n in (17, 1, 30)]),
        (oracle.text_tokens(9, 3), [], [oracle.text_tokens(n, 20 + n) for n in (12, 5)]),
    ]
    row, where = shared_prefix_row(folder, groups)
    ours = logits_of(folder, row, patches, grids)
    flat = [(group, completion) for group in groups for completion in group[2]]
    for ((prompt, own_grids, _), completion), (start, prompt_length, at, length) in zip(flat, where, strict=True):
        vision = dict(patches=patches, grids=own_grids) if own_grids else {}
        theirs = oracle.hf_logits(model, [*prompt, *completion], **vision)
        assert np.abs(ours[start : start + prompt_length] - theirs[:prompt_length]).max() < TOLERANCE
        assert np.abs(ours[at : at + length] - theirs[prompt_length:]).max() < TOLERANCE


def test_remat_policies_change_neither_loss_nor_gradient():
    folder = oracle.random_model("qwen2_5_vl")
    grids = [(1, 6, 10)]
    tokens = np.asarray(interleaved(grids))
    row = plain_row(folder, tokens, grids)
    results = []
    for remat in ("none", "attention", "full"):
        network, params = network_and_params(folder, remat)
        vision, (slots,) = pack_images(
            [(oracle.random_patches(grids)[0], grids[0])], network.config.vision, slots=128
        )
        image_slots = np.full((1, len(tokens)), -1)
        image_slots[0, tokens == network.config.image_token_id] = slots

        def loss(params, network=network, vision=vision, image_slots=image_slots):
            model = network.bind(params)
            x = model.embed(tokens[None], image_slots, model.encode_images(vision))
            mask = causal_intervals(np.array([len(tokens)]), len(tokens))
            return jnp.mean(jnp.sin(model.hidden(x, row["positions"][:, None], mask)))

        results.append(jax.jit(jax.value_and_grad(loss))(params))
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(results[0][1]))
    assert all(np.any(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(results[0][1]))
    for other in results[1:]:
        for a, b in zip(jax.tree.leaves(results[0]), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6 * max(largest, 1))
