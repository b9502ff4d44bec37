"""transformers as the oracle: small random Hugging Face models of every supported family, and what they compute.

`random_model` writes a folder that any loader opens (config, safetensors, tokenizer, processor, chat template);
the rest runs transformers on it in float32. Traps that these helpers step around: without `mm_token_type_ids` a
Qwen-VL model silently falls back to one-dimensional positions, and torchvision's image processor differs from
PIL's wherever it resizes.

Import it only after `pytest.importorskip("torch")`: transformers' models need torch.
"""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

KINDS = ("qwen2", "qwen2_vl", "qwen2_5_vl")
VOCABULARY = 512
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
VISION_TOKENS = SPECIAL_TOKENS[9:]
PLAIN_TOKENS = 480
"""Ids below this are byte-level BPE; the special tokens follow, then rows of the embedding that no token has."""

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' or 'image' in part or 'image_url' in part -%}
{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif part['type'] == 'video' or 'video' in part -%}
{{ '<|vision_start|><|video_pad|><|vision_end|>' }}
{%- elif 'text' in part -%}
{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""

CORPUS = (
    "system\nYou are a helpful assistant.\n",
    "user\nHow many red circles are in the picture? assistant\n",
    "Solve the following math problem efficiently and clearly. The last line of your response is the answer.",
    "<think> there are three circles and two squares, so the sum is 5 </think><answer> $\\boxed{5}$ </answer>",
    "Let x and y be real numbers such that x + y = 10 and xy = 21. Find the value of x^2 + y^2.",
    "First I look at the image: the blue square is on the left, the green triangle is on the right.",
)


@functools.cache
def build_tokenizer():
    """A fast tokenizer: byte-level BPE trained on a few sentences, with Qwen2.5's special tokens and chat template."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    def dressed(model) -> Tokenizer:
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    trainer = trainers.BpeTrainer(
        vocab_size=PLAIN_TOKENS,
        special_tokens=[],
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    trained = dressed(models.BPE())
    trained.train_from_iterator(CORPUS, trainer)
    model = json.loads(trained.to_str())["model"]
    vocabulary, merges = dict(model["vocab"]), [tuple(merge) for merge in model["merges"]]
    for index in range(len(vocabulary), PLAIN_TOKENS):
        vocabulary[f"<unreachable {index}>"] = index
    tokenizer = dressed(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL_TOKENS),
        model_max_length=32768,
        chat_template=CHAT_TEMPLATE,
    )


def token_id(token: str) -> int:
    """The id of a special token."""
    return PLAIN_TOKENS + SPECIAL_TOKENS.index(token)


def hf_config(kind: str, *, tied: bool, text: dict | None = None, vision: dict | None = None):
    """A small transformers config; `text` and `vision` override single fields."""
    import transformers

    ends = dict(bos_token_id=token_id("<|endoftext|>"), eos_token_id=token_id("<|im_end|>"))
    sizes = dict(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        tie_word_embeddings=tied,
        **ends,
    )
    if kind == "qwen2":
        rope = dict(rope_type="default", rope_theta=10_000.0)
        return transformers.Qwen2Config(**(sizes | dict(rope_parameters=rope) | (text or {})))
    sizes["rope_parameters"] = dict(rope_type="default", mrope_section=[2, 3, 3], rope_theta=10_000.0)
    tower: dict[str, Any] = dict(
        depth=4, num_heads=2, in_channels=3, patch_size=14, spatial_merge_size=2, temporal_patch_size=2
    )
    if kind == "qwen2_vl":
        tower |= dict(embed_dim=32, hidden_size=64, mlp_ratio=2)
        config_class = transformers.Qwen2VLConfig
    elif kind == "qwen2_5_vl":
        tower |= dict(
            hidden_size=32,
            intermediate_size=48,
            out_hidden_size=64,
            window_size=112,
            fullatt_block_indexes=[1, 3],
            tokens_per_second=2,
        )
        config_class = transformers.Qwen2_5_VLConfig
    else:
        raise ValueError(kind)
    return config_class(
        text_config=sizes | (text or {}),
        vision_config=tower | (vision or {}),
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=tied,
        **ends,
    )


def hf_class(kind: str):
    import transformers

    return {
        "qwen2": transformers.Qwen2ForCausalLM,
        "qwen2_vl": transformers.Qwen2VLForConditionalGeneration,
        "qwen2_5_vl": transformers.Qwen2_5_VLForConditionalGeneration,
    }[kind]


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Fill every parameter with numbers that make each of them matter: norms off 1, biases off 0, logits of order 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                fan_in = 1 if "embed_tokens" in name else parameter[0].numel()
                parameter.copy_(noise * (0.7 if fan_in == 1 else fan_in**-0.5))
            elif name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            else:
                parameter.copy_(1 + 0.1 * noise)
        if not model.config.tie_word_embeddings:
            return
        embedding = model.get_input_embeddings().weight
        embedding.mul_(0.3)


def write_side_files(folder: Path, kind: str) -> None:
    """Tokenizer, chat template and image processor, as a checkpoint from the hub has them."""
    build_tokenizer().save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    if kind == "qwen2":
        return
    processor = "Qwen2_5_VLProcessor" if kind == "qwen2_5_vl" else "Qwen2VLProcessor"
    settings = dict(
        image_processor_type="Qwen2VLImageProcessor",
        processor_class=processor,
        min_pixels=3136,
        max_pixels=1_003_520,
        patch_size=14,
        temporal_patch_size=2,
        merge_size=2,
        image_mean=[0.48145466, 0.4578275, 0.40821073],
        image_std=[0.26862954, 0.26130258, 0.27577711],
        do_convert_rgb=True,
        do_normalize=True,
        do_rescale=True,
        do_resize=True,
        resample=3,
        rescale_factor=1 / 255,
    )
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2))


def random_model(
    kind: str,
    tied: bool = True,
    folder: str | Path | None = None,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    text: dict | None = None,
    vision: dict | None = None,
) -> Path:
    """Write a random model of a family as a complete Hugging Face folder and return the folder.

    Without `folder` the model goes to a temporary one that is made once per process and arguments: don't write there.

    Args:
      kind: "qwen2", "qwen2_vl" or "qwen2_5_vl".
      tied: whether the head is the embedding.
      seed: of the weights.
      dtype: of the weights on disk.
      text, vision: fields of the config to override.
    """
    key = json.dumps([kind, tied, seed, str(dtype), text, vision], sort_keys=True)
    if folder is None:
        return _cached_model(key)
    return _write_model(key, Path(folder))


@functools.cache
def _cache_root() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="random-models-")


@functools.cache
def _cached_model(key: str) -> Path:
    return _write_model(key, Path(tempfile.mkdtemp(dir=_cache_root().name)))


def _write_model(key: str, folder: Path) -> Path:
    import transformers

    kind, tied, seed, dtype, text, vision = json.loads(key)
    folder.mkdir(parents=True, exist_ok=True)
    model = hf_class(kind)(hf_config(kind, tied=tied, text=text, vision=vision)).float()
    randomize(model, seed)
    model = model.to(getattr(torch, dtype.removeprefix("torch.")))
    ends = [token_id("<|im_end|>"), token_id("<|endoftext|>")]
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=token_id("<|endoftext|>"), pad_token_id=token_id("<|endoftext|>"), eos_token_id=ends
    )
    model.save_pretrained(folder)
    write_side_files(folder, kind)
    return folder


@functools.lru_cache(maxsize=8)
def load_model(folder: Path) -> torch.nn.Module:
    """The folder's model in transformers: float32, eager attention, evaluation mode."""
    kind = json.loads((Path(folder) / "config.json").read_text())["model_type"]
    model = hf_class(kind).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def random_image(height: int, width: int, seed: int = 0):
    """A PIL RGB image with structure at several scales, not mere noise."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (max(height // 16, 2), max(width // 16, 2), 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    noisy = smooth + rng.integers(-20, 21, smooth.shape)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def patches_of(images: list, **limits: int) -> tuple[np.ndarray, np.ndarray]:
    """transformers' patches of PIL images: float32 `[all patches, 1176]` and int `[images, 3]` grids."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    size = dict(shortest_edge=limits.get("min_pixels", 3136), longest_edge=limits.get("max_pixels", 1_003_520))
    made = Qwen2VLImageProcessorPil(size=size)(images=images, return_tensors="np")
    return np.asarray(made["pixel_values"], np.float32), np.asarray(made["image_grid_thw"])


def random_patches(grids: list[tuple[int, int, int]], seed: int = 0) -> list[np.ndarray]:
    """Random patches, float32 `[t*h*w, 1176]` per grid: images and videos without the pixels."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((t * h * w, 1176)).astype(np.float32) for t, h, w in grids]


def vision_span(grid: tuple[int, int, int], token: str = "<|image_pad|>") -> list[int]:
    """The prompt tokens of an image or video: start, one token per merged patch, end."""
    t, h, w = (int(n) for n in grid)
    return [token_id("<|vision_start|>"), *[token_id(token)] * (t * h * w // 4), token_id("<|vision_end|>")]


def text_tokens(length: int, seed: int = 0) -> list[int]:
    """Random plain tokens."""
    return np.random.default_rng(seed).integers(0, PLAIN_TOKENS, length).tolist()


def hf_inputs(
    token_ids,
    *,
    patches: list[np.ndarray] = (),
    grids: list = (),
    video_patches: list[np.ndarray] = (),
    video_grids: list = (),
    second_per_grid_ts: list[float] | None = None,
) -> dict[str, torch.Tensor]:
    """Arguments of a transformers model for one sequence (batch of 1), token types included."""
    ids = torch.as_tensor(np.asarray(token_ids), dtype=torch.long)[None]
    inputs = {"input_ids": ids}
    if len(grids) or len(video_grids):
        types = (ids == token_id("<|image_pad|>")).int() + 2 * (ids == token_id("<|video_pad|>")).int()
        inputs["mm_token_type_ids"] = types
    if len(grids):
        inputs["pixel_values"] = torch.from_numpy(np.concatenate(patches))
        inputs["image_grid_thw"] = torch.as_tensor(np.asarray(grids), dtype=torch.long)
    if len(video_grids):
        inputs["pixel_values_videos"] = torch.from_numpy(np.concatenate(video_patches))
        inputs["video_grid_thw"] = torch.as_tensor(np.asarray(video_grids), dtype=torch.long)
        if second_per_grid_ts is not None:
            inputs["second_per_grid_ts"] = torch.tensor(second_per_grid_ts)
    return inputs


def hf_logits(model, token_ids, **vision) -> np.ndarray:
    """transformers' logits of one sequence: float32 `[time, vocabulary]`. `vision` as `hf_inputs` takes it."""
    with torch.no_grad():
        return model(**hf_inputs(token_ids, **vision), use_cache=False).logits[0].numpy()


def hf_log_probs(model, prompt_ids, completion_ids, *, banned=(), temperature: float = 1.0, **vision) -> np.ndarray:
    """Log-probs of a completion's tokens after a prompt: float32 `[completion]`."""
    logits = hf_logits(model, [*prompt_ids, *completion_ids], **vision)[len(prompt_ids) - 1 : -1] / temperature
    logits = logits.astype(np.float64)
    logits[:, list(banned)] = -np.inf
    largest = logits.max(-1, keepdims=True)
    normalizer = largest[:, 0] + np.log(np.exp(logits - largest).sum(-1))
    chosen = np.take_along_axis(logits, np.asarray(completion_ids)[:, None], -1)[:, 0]
    return (chosen - normalizer).astype(np.float32)


def hf_generate(model, prompt_ids, *, max_new_tokens: int, suppress=(), **vision) -> list[int]:
    """transformers' greedy completion of one prompt, `suppress` never sampled; the end token is included."""
    inputs = hf_inputs(prompt_ids, **vision)
    with torch.no_grad():
        out = model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, suppress_tokens=list(suppress) or None
        )
    return out[0, len(prompt_ids) :].tolist()


def flax_params(model) -> dict:
    """The model's weights as the nested dict of float32 NumPy arrays that `Network` takes, written out by hand.

    It is a second statement of the layout, independent of the weight bridge, so that the two check each other.
    """
    state = {name: tensor.detach().float().numpy() for name, tensor in model.state_dict().items()}
    config = model.config.get_text_config()
    prefix = "model.language_model." if "model.language_model.norm.weight" in state else "model."

    def stack(pattern: str, count: int, transpose: bool = False) -> np.ndarray:
        arrays = [state[pattern.format(i)] for i in range(count)]
        return np.stack([array.T if transpose else array for array in arrays])

    layer = prefix + "layers.{}."
    n = config.num_hidden_layers
    layers: dict[str, Any] = {
        "input_norm": {"scale": stack(layer + "input_layernorm.weight", n)},
        "mlp_norm": {"scale": stack(layer + "post_attention_layernorm.weight", n)},
        "output": {"kernel": stack(layer + "self_attn.o_proj.weight", n, True)},
    }
    for name, short in (("query", "q"), ("key", "k"), ("value", "v")):
        layers[name] = {
            "kernel": stack(layer + f"self_attn.{short}_proj.weight", n, True),
            "bias": stack(layer + f"self_attn.{short}_proj.bias", n),
        }
    for name in ("gate", "up", "down"):
        layers[name] = {"kernel": stack(layer + f"mlp.{name}_proj.weight", n, True)}
    language: dict[str, Any] = {
        "embed": {"embedding": state[prefix + "embed_tokens.weight"]},
        "layers": layers,
        "norm": {"scale": state[prefix + "norm.weight"]},
    }
    if not model.config.tie_word_embeddings:
        language["head"] = {"embedding": state["lm_head.weight"]}
    params: dict[str, Any] = {"language": language}
    if "model.visual.patch_embed.proj.weight" in state:
        params["vision"] = _flax_vision(state, stack, model.config.vision_config)
    return params


def _flax_vision(state: dict[str, np.ndarray], stack, config) -> dict:
    block, n = "model.visual.blocks.{}.", config.depth
    width = state["model.visual.patch_embed.proj.weight"].shape[0]

    def linear(name: str) -> dict[str, np.ndarray]:
        return {"kernel": stack(block + name + ".weight", n, True), "bias": stack(block + name + ".bias", n)}

    def norm(name: str) -> dict[str, np.ndarray]:
        parts = {"scale": stack(block + name + ".weight", n)}
        if block.format(0) + name + ".bias" in state:
            parts["bias"] = stack(block + name + ".bias", n)
        return parts

    fused = linear("attn.qkv")
    blocks = {
        "norm1": norm("norm1"),
        "norm2": norm("norm2"),
        "qkv": {"kernel": fused["kernel"].reshape(n, width, 3, width), "bias": fused["bias"].reshape(n, 3, width)},
        "proj": linear("attn.proj"),
    }
    if config.model_type.startswith("qwen2_5"):
        blocks |= {name: linear(f"mlp.{name}_proj") for name in ("gate", "up", "down")}
    else:
        blocks |= {name: linear(f"mlp.{name}") for name in ("fc1", "fc2")}
    merger = "model.visual.merger."
    merger_norm = {"scale": state[merger + "ln_q.weight"]}
    if merger + "ln_q.bias" in state:
        merger_norm["bias"] = state[merger + "ln_q.bias"]
    return {
        "patch": {"kernel": state["model.visual.patch_embed.proj.weight"].reshape(width, -1).T},
        "blocks": blocks,
        "merger": {
            "norm": merger_norm,
            "fc1": {"kernel": state[merger + "mlp.0.weight"].T, "bias": state[merger + "mlp.0.bias"]},
            "fc2": {"kernel": state[merger + "mlp.2.weight"].T, "bias": state[merger + "mlp.2.bias"]},
        },
    }
