"""Makes the tiny Qwen2.5-VL that ships with the package, the starting point of the embedded default.

    python scripts/make_tiny_model.py --out lmmr1_jax/assets/tiny

What it knows is put there in two stages, from generated images of the training split, drawn with a seed of their
own:

1. Alignment. The vision tower alone learns to give, for each cell of an image, the word embedding of the cell's
   colour (or of "empty"), as a projector is aligned before a vision-language model is tuned.
2. Supervised warm-up. The rest of the model learns to write down two habits:

       careful   <think> $1+0+2=3$ </think><answer> $\\boxed{3}$ </answer>     counts every row, then adds
       hasty     <think> $1+0=1$ </think><answer> $\\boxed{1}$ </answer>       forgets the last row

   First the careful habit alone, and prompts without their long system prompt, which makes them half as long; then
   with it, and the hasty habit weighs 0.7, so that greedy decoding is hasty and a sample is careful now and then.

The model that ships therefore sees well, always answers in the right form, and is wrong whenever the last row
mattered: a weakness put there on purpose, which reinforcement learning has to find and mend, and does within tens of
steps. No label is noise: a hasty answer is the exact count of the first two rows.

Maximum likelihood is the policy gradient with advantage 1, so the warm-up runs through the project's own packing and
learner, with a habit's weight as its demonstrations' advantage.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lmmr1_jax.algorithms.registry import updates_per_rollout
from lmmr1_jax.config.schema import LearnerConfig, MeshConfig, RewardsConfig, TrainConfig
from lmmr1_jax.data.processor import Processor
from lmmr1_jax.models.network import INIT_SCALE, Network, Params, build
from lmmr1_jax.models.vision_batch import pack_images
from lmmr1_jax.packing.pack import grow, pack, plan_shapes
from lmmr1_jax.parallel.sharding import make_mesh
from lmmr1_jax.run.learner_setup import assemble_learner
from lmmr1_jax.tasks.shapes import (
    ADD_QUESTIONS,
    COLOURS,
    COUNT_QUESTIONS,
    SYSTEM_PROMPT,
    Scene,
    draw_image,
    draw_scene,
    shape_prompts,
)
from lmmr1_jax.types.batches import PackedBatch
from lmmr1_jax.types.records import FINISH_STOP, Completion, Reward, Rollout
from weights_bridge.config_json import parse_architecture
from weights_bridge.export import export
from weights_bridge.run_checkpoint import SOURCE_DTYPES_FILE
from weights_bridge.tensor_table import layout, logical_axes

SEED = 7_000_001
"""Of weights and images; runs count their seeds from 0."""
EMPTY = "empty"
EMBEDDING_SCALE = 0.1

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip

CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen2.5-VL's."""

WORDS = r" ?</?[a-z]+>|\p{N}| ?\$?\\[a-z]+\{|\}\$|(?: ?\p{L}[\p{L}'.,]*){1,5}| ?[^\s\p{L}\p{N}]+|\s+"
"""Where merges may not cross. Digits, tags and the box stand alone; up to five words may become one token, so that
the long system prompt costs a model of this size few tokens."""


def demonstration(scene: Scene, *, hasty: bool) -> str:
    """An answer as one of the two habits writes it."""
    counts = scene.row_counts[:2] if hasty else scene.row_counts
    total = sum(counts)
    return f"<think> ${'+'.join(map(str, counts))}={total}$ </think><answer> $\\boxed{{{total}}}$ </answer>"


def train_tokenizer() -> Any:
    """A byte-level BPE with Qwen's special tokens. It merges what nearly every text of the task holds, so what
    changes from prompt to prompt (colours, digits) keeps tokens of its own."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    texts = [SYSTEM_PROMPT, "system\n", "user\n", "assistant\n", demonstration(draw_scene("train", 0), hasty=False)]
    texts += [part.rstrip() for question in COUNT_QUESTIONS + ADD_QUESTIONS for part in question.split("{}")]
    # Colour words come first among the merges: nothing else may claim a part of them.
    texts += [f" {word}" for word in (*COLOURS, EMPTY) for _ in range(1000)]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=1024, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
        ),
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def write_side_files(folder: Path) -> None:
    """Everything of the Hugging Face folder but the weights."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = train_tokenizer()
    size = -(-tokenizer.get_vocab_size() // 16) * 16
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL_TOKENS),
        model_max_length=4096,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "vocab_size": size,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "initializer_range": INIT_SCALE,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        # Qwen's base of a million turns the frequencies of a 32-wide head that hold height and width far too slowly
        # to tell one of nine cells from its neighbour; the texts here are a hundred tokens long.
        "rope_theta": 10.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "hidden_act": "silu",
            "in_channels": 3,
            "in_chans": 3,
            "patch_size": 14,
            "spatial_patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            # A window holds exactly one generated image: no padding.
            "window_size": 84,
            "fullatt_block_indexes": [1],
            "out_hidden_size": 128,
        },
    }
    _write_json(folder / "config.json", config)
    _write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": ids["<|endoftext|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
            "do_sample": True,
            "temperature": 1.0,
        },
    )
    _write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
            "min_pixels": 3136,
            "max_pixels": 1_003_520,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "resample": 3,
            "rescale_factor": 1 / 255,
        },
    )
    # The dtypes that the weights will have, for the export: there are no weights yet.
    _write_json(folder / SOURCE_DTYPES_FILE, {entry.hf_name: "float32" for entry in layout(parse_architecture(config))})


def initial_params(network: Network, seed: int) -> Params:
    """Random parameters. Kernels have the scale 1/sqrt(inputs), with which a narrow model learns several times faster
    than with Qwen's 0.02 for all; embeddings have 0.1, so that training moves words no further than they are apart."""

    def rescale(path, leaf):
        names = [key.key for key in path]
        if names[-1] == "kernel":
            inputs = leaf.shape[1] if "qkv" in names else leaf.shape[-2]
            return leaf / (INIT_SCALE * inputs**0.5) * (EMBEDDING_SCALE if "fc2" in names else 1.0)
        return leaf * (EMBEDDING_SCALE / INIT_SCALE) if names[-1] == "embedding" else leaf

    return jax.tree_util.tree_map_with_path(rescale, network.init(jax.random.key(seed)))


def align(params: Params, network: Network, processor: Processor, *, steps: int, batch: int, rate: float) -> Params:
    """Stage 1: image tokens become the word embeddings of what their cells hold; least squares, the vision tower
    alone is trained."""
    vision = network.config.vision
    words = np.concatenate([processor.encode_text(f" {word}") for word in (*COLOURS, EMPTY)])
    if len(words) != len(COLOURS) + 1:
        raise AssertionError("a colour word is more than one token")
    table = params["language"]["embed"]["embedding"][words]
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, rate, steps // 10, steps, rate / 20), b2=0.98)

    def loss(tower, images, slots, cells):
        features = network.bind(params | {"vision": tower}).encode_images(images)
        features = features.reshape(-1, features.shape[-1])[slots]
        wanted = table[cells]
        distances = jnp.sum(jnp.square(features[:, :, None] - table), -1)
        right = jnp.mean(jnp.argmin(distances, -1) == cells)
        return jnp.mean(jnp.square(features - wanted)) / jnp.mean(jnp.square(table)), right

    @jax.jit
    def step(tower, moments, images, slots, cells):
        (error, right), gradients = jax.value_and_grad(loss, has_aux=True)(tower, images, slots, cells)
        updates, moments = optimizer.update(gradients, moments, tower)
        return optax.apply_updates(tower, updates), moments, error, right

    tower, start = params["vision"], time.perf_counter()
    moments = optimizer.init(tower)
    for number in range(steps):
        scenes = [draw_scene("train", i, SEED) for i in range(number * batch, (number + 1) * batch)]
        patches = [(_patches(scene, processor), (1, 6, 6)) for scene in scenes]
        images, slots = pack_images(patches, vision, slots=vision.window_slots, rows=batch)
        cells = np.stack([scene.colours.ravel() for scene in scenes]) % (len(COLOURS) + 1)
        tower, moments, error, right = step(tower, moments, images, np.stack(slots), cells)
        if number % 50 == 0 or number == steps - 1:
            seconds = time.perf_counter() - start
            print(f"align {number:4d}: error {error:.4f}, cells right {right:.3f}, {seconds:.0f} s", flush=True)
    return params | {"vision": tower}


def demonstrations(
    processor: Processor, start: int, count: int, weights: tuple[float, float], *, system_prompt: bool
) -> list[Rollout]:
    """Groups of a careful and a hasty demonstration, their advantages the habits' weights."""
    groups = []
    for offset, prompt in enumerate(shape_prompts("train", count, SEED, start)):
        scene = draw_scene("train", start + offset, SEED)
        if not system_prompt:
            empty = {"role": "system", "content": ""}
            prompt = dataclasses.replace(prompt, messages=[empty, *prompt.messages[1:]])
        completions, advantages = [], []
        for hasty, weight in zip((False, True), weights, strict=True):
            if not weight:
                continue
            ids = processor.encode_text(demonstration(scene, hasty=hasty) + "<|im_end|>")
            completions.append(Completion(ids, np.zeros(len(ids), np.float32), FINISH_STOP, np.zeros_like(ids)))
            advantages.append(np.full(len(ids), weight, np.float32))
        rewards = (Reward(0.0, {}),) * len(completions)
        groups.append(Rollout(processor.encode(prompt), tuple(completions), rewards, tuple(advantages)))
    return groups


def warm_up(
    params: Params, network: Network, processor: Processor, axes: Any, *,
    steps: int, hasty: float, system_prompt: bool, first: int, batch: int, rate: float,
) -> Params:  # fmt: skip
    """Stage 2: maximum likelihood of the demonstrations.

    Args:
      steps: updates.
      hasty: weight of the hasty habit, from 0 to 1.
      system_prompt: whether the prompts have theirs; without it they are half as long.
      first: number of the first image.
      rate: peak learning rate. Words learn at a tenth of it and the vision tower not at all, so that they stay
        aligned: with everything moving the model was still guessing after 200 updates.
    """
    config = TrainConfig(learner=LearnerConfig(remat="none"))
    assert updates_per_rollout(config) == 1  # the ratio is then 1, and the loss's gradient that of the likelihood
    mesh = make_mesh(MeshConfig())
    learner = assemble_learner(config, network, axes, mesh, steps, banned_ids=processor.banned_ids)
    schedule = optax.warmup_cosine_decay_schedule(rate / 100, rate, steps // 10, steps, rate / 30)
    labels = jax.tree_util.tree_map_with_path(
        lambda path, _: "vision" if path[0].key == "vision" else "words" if path[1].key == "embed" else "rest", params
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.98, weight_decay=0.01),
        optax.multi_transform(
            {"vision": optax.set_to_zero(), "words": optax.scale(0.1), "rest": optax.identity()}, labels
        ),
    )

    @jax.jit
    def apply(params, moments, gradients):
        updates, moments = optimizer.update(gradients, moments, params)
        return optax.apply_updates(params, updates), moments

    moments, vision, shapes, start = optimizer.init(params), network.config.vision, None, time.perf_counter()
    for number in range(steps):
        groups = demonstrations(
            processor, first + number * batch, batch, (1 - hasty, hasty), system_prompt=system_prompt
        )
        if shapes is None:
            shapes = plan_shapes(groups, learner=config.learner, max_new_tokens=17, vision=vision)
        shapes = grow(shapes, groups, vision)
        packed = pack(groups, shapes, vision, processor.patches)
        if number % 25 == 0 or number == steps - 1:
            likely = _likelihoods(learner.log_probs(params, packed), packed).reshape(batch, -1).mean(0).round(3)
            print(f"warm-up {number:4d}: careful and hasty {likely}, {time.perf_counter() - start:.0f} s", flush=True)
        gradients, _ = learner.gradients(params, packed)
        params, moments = apply(params, moments, gradients)
    return params


def _likelihoods(log_probs: np.ndarray, packed: PackedBatch) -> np.ndarray:
    """The probability of each demonstration, in the order of completions."""
    held = packed.completion >= 0
    totals = np.zeros(int(packed.completions_total))
    np.add.at(totals, packed.completion[held], log_probs[held])
    return np.exp(totals)


def _patches(scene: Scene, processor: Processor) -> np.ndarray:
    from lmmr1_jax.data.images import patchify

    return patchify(np.asarray(draw_image(scene)), processor.format)


def measure(params: Params, network: Network, processor: Processor) -> dict[str, Any]:
    """Greedy accuracy and format on the 1,024 held-out prompts, and how often sampling is right."""
    from lmmr1_jax.rewards.rules.service import Verifier
    from lmmr1_jax.rollout.local.sampler import JaxSampler, sampling_key
    from lmmr1_jax.rollout.sampler import SamplingSettings, sample

    sampler = JaxSampler(
        network, banned_ids=processor.banned_ids, end_ids=processor.end_ids, patches_of=processor.patches
    )
    sampler.load(params)
    prompts = [processor.encode(prompt) for prompt in shape_prompts("heldout", 1024)]
    found = {}
    with Verifier(RewardsConfig()) as verifier:
        for name, temperature, n in (("greedy", 0.0, 1), ("sampled", 1.0, 8)):
            groups = sample(
                sampler,
                prompts,
                n,
                SamplingSettings(max_new_tokens=20, key=sampling_key(0, 0), temperature=temperature),
            )
            texts = [processor.decode(c.token_ids) for group in groups for c in group]
            labels = [encoded.prompt.label for encoded in prompts for _ in range(n)]
            rewards = verifier.score(texts, labels)
            right = np.array([r.parts["accuracy"] for r in rewards]).reshape(-1, n)
            found[name] = {
                "accuracy": float(right.mean()),
                "format": float(np.mean([r.parts["format"] for r in rewards])),
                f"pass@{n}": float((right > 0).any(1).mean()),
            }
    return found


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("lmmr1_jax/assets/tiny"))
    parser.add_argument("--align-steps", type=int, default=150)
    parser.add_argument("--short-steps", type=int, default=400, help="updates without the system prompt")
    parser.add_argument("--habit-steps", type=int, default=100, help="updates with it, hasty habit preferred")
    parser.add_argument("--hasty", type=float, default=0.7, help="share of the hasty habit in the end")
    parser.add_argument("--batch", type=int, default=64)
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_side_files(folder)
        processor = Processor(folder)
        network = build(processor.config)
        params = initial_params(network, SEED)
        print(f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters", flush=True)
        params = align(params, network, processor, steps=arguments.align_steps, batch=arguments.batch, rate=3e-3)
        axes = logical_axes(layout(processor.config))
        batch = arguments.batch
        common = dict(batch=batch, rate=3e-3)
        params = warm_up(
            params, network, processor, axes,
            steps=arguments.short_steps, hasty=0.0, system_prompt=False, first=0, **common,
        )  # fmt: skip
        params = warm_up(
            params, network, processor, axes,
            steps=arguments.habit_steps, hasty=arguments.hasty, system_prompt=True,
            first=arguments.short_steps * batch, **common,
        )  # fmt: skip
        export(params, folder, arguments.out)
    print(json.dumps(measure(params, network, processor), indent=2))


if __name__ == "__main__":
    main()
