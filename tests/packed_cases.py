"""Small models and rollouts for tests of the learner, and what they must give, computed without packing.

Nothing here needs torch. The oracle runs every completion as a sequence of its own, behind its own copy of the
prompt, with logits over the whole vocabulary, and leaves the rest to jax.grad.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lmmr1_jax.learner.state import POLICY, TrainState
from lmmr1_jax.models.attention.mask import causal_intervals
from lmmr1_jax.models.network import Network, build
from lmmr1_jax.models.positions import prompt_positions
from lmmr1_jax.models.vision_batch import pack_images
from lmmr1_jax.types.batches import PackedBatch
from lmmr1_jax.types.records import Completion, EncodedPrompt, Image, Prompt, Reward, Rollout
from weights_bridge.architecture import Architecture

IMAGE, VIDEO, START, END = 90, 91, 92, 93
BANNED = (IMAGE, VIDEO, START, END)
VOCABULARY = 96


def hf_config(*, vision: bool = True, tied: bool = True) -> dict:
    """`config.json` of a small Qwen2.5-VL (or Qwen2): widths divisible by 8, heads by 4, key-value heads by 2."""
    config = {
        "model_type": "qwen2", "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0, "tie_word_embeddings": tied,
    }  # fmt: skip
    if not vision:
        return config
    tower = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 40, "num_heads": 4, "patch_size": 14,
        "temporal_patch_size": 2, "spatial_merge_size": 2, "in_chans": 3, "window_size": 56,
        "fullatt_block_indexes": [1], "out_hidden_size": 32, "hidden_act": "silu", "tokens_per_second": 2,
    }  # fmt: skip
    return config | {
        "model_type": "qwen2_5_vl", "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
        "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END,
        "vision_config": tower,
    }  # fmt: skip


def network(config: Architecture, remat: str = "none", constrain=None, compute_dtype=jnp.float32) -> Network:
    return build(config, compute_dtype, remat, **({} if constrain is None else {"constrain": constrain}))


def random_params(net: Network, seed: int = 0):
    """Numbers that make every parameter matter: kernels of order 1 / sqrt(inputs), norms off 1, biases off 0."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(net.abstract_params)
    rng = np.random.default_rng(seed)

    def stacked(path):
        return int(any(key.key in ("layers", "blocks") for key in path))

    def fill(path, leaf):
        name = path[-1].key
        noise = rng.normal(size=leaf.shape)
        if name == "scale":
            return 1 + 0.2 * noise
        if name == "bias":
            return 0.2 * noise
        return noise * (0.5 if name == "embedding" else leaf.shape[stacked(path)] ** -0.5)

    return jax.tree.unflatten(tree, [jnp.asarray(fill(p, leaf), jnp.float32) for p, leaf in leaves])


def patches_of(image: Image) -> np.ndarray:
    """Random patches that the image's pixels name: float32 `[t*h*w, 1176]`."""
    rng = np.random.default_rng(int(image.pixels[0, 0, 0]))
    return rng.normal(size=(int(np.prod(image.grid_thw)), 1176)).astype(np.float32)


def encoded_prompt(config: Architecture, name: int, length: int, grids=()) -> EncodedPrompt:
    """`length` text tokens with the images after the first of them."""
    rng = np.random.default_rng(100 + name)
    tokens = list(rng.integers(0, 90, size=length))
    slots, inserted = [], []
    for grid in grids:
        count = grid[0] * grid[1] * grid[2] // 4
        slots += range(1 + len(inserted) + 1, 1 + len(inserted) + 1 + count)
        inserted += [START, *[IMAGE] * count, END]
    tokens = np.asarray([*tokens[:1], *inserted, *tokens[1:]], np.int32)
    positions, following = prompt_positions(tokens, list(grids), config)
    images = tuple(
        Image(np.full((g[1] * 14, g[2] * 14, 3), 10 * name + i, np.uint8), g) for i, g in enumerate(grids)
    )
    prompt = Prompt([], None, f"prompt-{name}", "test", "test", name)
    return EncodedPrompt(prompt, tokens, positions, images, np.asarray(slots, np.int32), following)


def random_rollouts(config: Architecture, seed: int = 0) -> list[Rollout]:
    """Groups of different sizes: text alone, one image, two images of odd sizes; completions of 1 to 9 tokens."""
    rng = np.random.default_rng(seed)
    if config.vision is None:
        shapes = [(5, (), 3), (2, (), 2), (9, (), 4), (7, (), 2)]
    else:
        shapes = [(5, ((1, 4, 4),), 3), (2, (), 2), (6, ((1, 2, 6), (1, 6, 4)), 4), (3, ((1, 4, 2),), 2)]
    rollouts = []
    for name, (length, grids, count) in enumerate(shapes):
        lengths = [1, *rng.integers(2, 10, size=count - 1)]
        completions = tuple(
            Completion(
                rng.integers(0, 90, size=n).astype(np.int32),
                rng.normal(-3, 1, size=n).astype(np.float32),
                "stop",
                np.zeros(n, np.int32),
            )
            for n in lengths
        )
        advantages = tuple(np.full(n, rng.normal(), np.float32) for n in lengths)
        rewards = tuple(Reward(0.0, {}) for _ in lengths)
        rollouts.append(Rollout(encoded_prompt(config, name, length, grids), completions, rewards, advantages))
    return rollouts


def oracle_inputs(config: Architecture, rollouts: list[Rollout], length: int = 64) -> dict:
    """Every completion in a row of its own, `[completions, length]`, behind its own copy of the prompt."""
    pairs = [(r.encoded, c) for r in rollouts for c in r.completions]
    shape = (len(pairs), length)
    tokens, slots = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
    lengths = np.zeros(len(pairs), np.int32)
    positions = np.zeros((3, *shape), np.int32)
    taken = np.zeros(shape, bool)  # where a completion token stands
    sampler = np.zeros(shape, np.float32)
    vision, placed = None, {}
    if config.vision is not None:
        images = {id(p): (patches_of(p), p.grid_thw) for r in rollouts for p in r.encoded.images}
        vision, token_slots = pack_images(list(images.values()), config.vision, slots=64)
        placed = dict(zip(images, token_slots, strict=True))
    for row, (encoded, completion) in enumerate(pairs):
        p, n = encoded.token_ids.size, completion.token_ids.size
        tokens[row, : p + n] = np.concatenate([encoded.token_ids, completion.token_ids])
        lengths[row] = p + n
        positions[:, row, :p] = encoded.positions
        positions[:, row, p : p + n] = encoded.next_position + np.arange(n)
        taken[row, p : p + n] = True
        sampler[row, p : p + n] = completion.log_probs
        if encoded.images:
            slots[row, encoded.image_slots] = np.concatenate([placed[id(p)] for p in encoded.images])
    return dict(
        tokens=tokens, lengths=lengths, slots=slots, positions=positions, taken=taken, sampler=sampler, vision=vision
    )  # fmt: skip


def drawn_by_another(net: Network, params, rollouts: list[Rollout], temperature: float = 1.0) -> list[Rollout]:
    """The rollouts with sampler log-probs that lie around the policy's, now and then a factor of 2 away."""
    inputs = oracle_inputs(net.config, rollouts)
    dense = np.asarray(oracle_log_probs(net, params, inputs, temperature))
    noise = np.random.default_rng(1).normal(0, 0.5, dense.shape).astype(np.float32)
    rows = iter([row[taken] for row, taken in zip(dense + noise, inputs["taken"], strict=True)])
    return [
        dataclasses.replace(r, completions=tuple(dataclasses.replace(c, log_probs=next(rows)) for c in r.completions))
        for r in rollouts
    ]


def oracle_log_probs(net: Network, params, inputs: dict, temperature: float = 1.0) -> jax.Array:
    """PolicyModel log-probs `[completions, length]`, 0 where no completion token stands; dense, packing nothing."""
    model = net.bind(params)
    features = None if inputs["vision"] is None else model.encode_images(inputs["vision"])
    x = model.embed(inputs["tokens"], inputs["slots"], features)
    hidden = model.hidden(x, inputs["positions"], causal_intervals(inputs["lengths"], x.shape[1]))
    penalty = jnp.zeros(VOCABULARY).at[jnp.array(BANNED)].set(-jnp.inf)
    logits = hidden @ model.head_embedding().T / temperature + penalty
    following = jnp.roll(inputs["tokens"], -1, 1)
    taken = jnp.take_along_axis(jax.nn.log_softmax(logits), following[..., None], -1)[..., 0]
    return jnp.where(inputs["taken"], jnp.roll(taken, 1, 1), 0)


@functools.cache
def _oracle(config: Architecture, temperature: float, importance: str):
    net = network(config)

    def loss(params, inputs, advantages):
        log_probs = oracle_log_probs(net, params, inputs, temperature)
        log_weight = jax.lax.stop_gradient(log_probs) - inputs["sampler"]
        if importance == "sequence":  # a row is a completion, and 0 beside it
            log_weight = jnp.sum(log_weight, 1, keepdims=True)
        weight = 1.0 if importance == "none" else jnp.minimum(jnp.exp(log_weight), 2.0)
        return -jnp.sum(weight * advantages * log_probs) / jnp.sum(inputs["taken"])

    return jax.jit(jax.grad(loss))


def oracle_gradients(
    net: Network, params, rollouts: list[Rollout], temperature: float = 1.0, importance: str = "none"
):
    """Of -sum(w A lp) / T, which is the gradient of the clipped loss where the ratio is 1; w is cut at 2."""
    inputs = oracle_inputs(net.config, rollouts)
    advantages = np.zeros(inputs["tokens"].shape, np.float32)
    advantages[inputs["taken"]] = np.concatenate([a for r in rollouts for a in r.advantages])
    return _oracle(net.config, temperature, importance)(params, inputs, advantages)


def assert_gradients_close(ours, theirs, limit: float = 1e-5) -> None:
    """Per tensor, max|difference| <= limit * max|gradient|."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        # A key's bias moves all scores of a query alike: its gradient is 0 but for rounding.
        scale = max(np.abs(b).max(), 1e-6)
        assert np.abs(a - b).max() <= limit * scale, (jax.tree_util.keystr(path), np.abs(a - b).max(), scale)


def pack_by_hand(rollouts: list[Rollout], config: Architecture, *, rows: int, length: int = 64, slots: int = 32):
    """A group a row, `rows` groups a micro-batch: small enough to be checked by reading."""
    count = -(-len(rollouts) // rows)
    shape, out = (count, rows, length), (count, rows, slots)
    int32 = lambda shape, value=0: np.full(shape, value, np.int32)  # noqa: E731
    batch = PackedBatch(
        tokens=int32(shape), low=int32(shape), high=int32(shape),
        positions=int32((count, 3, rows, length)),
        image_slots=int32(shape, -1), source=int32(out), target=int32(out), mask=np.zeros(out, np.float32),
        completion=int32(out, -1), advantages=np.zeros(out, np.float32), old_log_probs=np.zeros(out, np.float32),
        sampler_log_probs=np.zeros(out, np.float32), reference_log_probs=np.zeros(out, np.float32), vision=None,
        micro_batches=np.int32(count), tokens_total=np.float32(0), completions_total=np.float32(0),
        kl_coefficient=np.float32(0),
    )  # fmt: skip
    number = 0
    for index, rollout in enumerate(rollouts):
        at = divmod(index, rows)
        encoded = rollout.encoded
        end, out_end = encoded.token_ids.size, 0
        batch.tokens[at][:end] = encoded.token_ids
        batch.low[at][:end] = np.arange(end)
        batch.positions[at[0], :, at[1], :end] = encoded.positions
        for i, completion in enumerate(rollout.completions):
            n = completion.token_ids.size
            here, there = slice(end, end + n), slice(out_end, out_end + n)
            batch.tokens[at][here] = completion.token_ids
            batch.low[at][here], batch.high[at][here] = np.arange(end, end + n), end + n
            batch.positions[at[0], :, at[1], here] = encoded.next_position + np.arange(n)
            batch.source[at][there] = [encoded.token_ids.size - 1, *range(end, end + n - 1)]
            batch.target[at][there] = completion.token_ids
            batch.mask[at][there] = 1
            batch.completion[at][there] = number
            batch.advantages[at][there] = rollout.advantages[i]
            batch.sampler_log_probs[at][there] = completion.log_probs
            end, out_end, number = end + n, out_end + n, number + 1
        batch.high[at][: encoded.token_ids.size] = end
    return dataclasses.replace(
        batch,
        vision=_images_by_hand(rollouts, config, batch.image_slots, rows),
        tokens_total=batch.mask.sum(dtype=np.float32),
        completions_total=np.float32(number),
    )


def _images_by_hand(rollouts, config, image_slots, rows):
    if config.vision is None:
        return None
    batches = []
    for start in range(0, len(rollouts), rows):
        members = rollouts[start : start + rows]
        images = [(patches_of(p), p.grid_thw) for r in members for p in r.encoded.images]
        vision, token_slots = pack_images(images, config.vision, slots=64, rows=4)
        taken = 0
        for row, rollout in enumerate(members):
            mine = token_slots[taken : taken + len(rollout.encoded.images)]
            taken += len(mine)
            if mine:
                image_slots[start // rows, row, rollout.encoded.image_slots] = np.concatenate(mine)
        batches.append(vision)
    return jax.tree.map(lambda *arrays: np.stack(arrays), *batches)


def first_moments(state: TrainState, name: str = POLICY):
    """Adam's first moments of a trainable; without memory (`adam_b1` 0) and clipping they are its gradients."""
    return optax.tree_utils.tree_get(state.trained[name].opt_state, "mu")
