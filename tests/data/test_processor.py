"""One preprocessor for everything: tokens, positions and patches are transformers', limits are counted skips."""

import json
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import oracle  # noqa: E402
from PIL import Image  # noqa: E402

from lmmr1_jax.data.faults import SkipPrompt  # noqa: E402
from lmmr1_jax.data.messages import parse_messages  # noqa: E402
from lmmr1_jax.data.processor import Processor  # noqa: E402
from lmmr1_jax.runtime.errors import UserError  # noqa: E402
from lmmr1_jax.types.records import Prompt  # noqa: E402
from weights_bridge.errors import CheckpointError  # noqa: E402


def prompt(content, folder):
    messages = content if isinstance(content, list) and "role" in content[0] else [{"role": "user", "content": content}]
    return Prompt(parse_messages(messages), "3", "0", "made", str(folder / "set.jsonl"), 0)


def reason(processor, content, folder):
    with pytest.raises(SkipPrompt) as caught:
        processor.encode(prompt(content, folder))
    return caught.value.reason


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of odd sizes."""
    folder = tmp_path_factory.mktemp("images")
    for name, size in (("a", (100, 61)), ("b", (300, 200)), ("c", (28, 28))):
        oracle.random_image(*size).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def processor():
    return Processor(oracle.random_model("qwen2_5_vl"), max_pixels=40_000)


MIXED = [
    {"type": "text", "text": "Compare "},
    {"type": "image", "image": "a.png"},
    {"type": "text", "text": " with "},
    {"type": "image", "image": "b.png"},
    {"type": "image", "image": "c.png"},
]


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
def test_tokens_positions_and_patches_are_those_of_transformers(kind, folder):
    model_folder = oracle.random_model(kind)
    encoder = Processor(model_folder, max_pixels=40_000)
    encoded = encoder.encode(prompt(MIXED, folder))

    patches, grids = oracle.patches_of([Image.open(folder / f"{n}.png") for n in "abc"], max_pixels=40_000)
    tokenizer = oracle.build_tokenizer()
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": MIXED}], tokenize=False, add_generation_prompt=True
    )
    pieces = text.split("<|image_pad|>")
    text = pieces[0] + "".join(
        "<|image_pad|>" * int(np.prod(grid) // 4) + piece for grid, piece in zip(grids, pieces[1:], strict=True)
    )
    assert encoded.token_ids.tolist() == tokenizer(text)["input_ids"]
    assert [p.grid_thw for p in encoded.images] == [tuple(grid) for grid in grids]
    np.testing.assert_allclose(
        np.concatenate([encoder.patches(p) for p in encoded.images]), patches, rtol=0, atol=2e-7
    )

    inputs = oracle.hf_inputs(encoded.token_ids, patches=[patches], grids=grids)
    positions, delta = oracle.load_model(model_folder).model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], image_grid_thw=inputs["image_grid_thw"]
    )
    assert encoded.positions.tolist() == positions[:, 0].tolist()
    assert encoded.next_position == len(encoded.token_ids) + int(delta)
    assert (encoded.token_ids[encoded.image_slots] == encoder.config.image_token_id).all()
    assert len(encoded.image_slots) == sum(np.prod(grid) // 4 for grid in grids)


@pytest.mark.parametrize("kind", ["qwen2", "qwen2_5_vl"])
def test_text_prompts_are_encoded_alike_whether_text_or_parts(kind, folder):
    encoder = Processor(oracle.random_model(kind))
    plain = encoder.encode(prompt("How many circles?", folder))
    halves = [{"type": "text", "text": "How many "}, {"type": "text", "text": "circles?"}]
    parts = encoder.encode(prompt(halves, folder))
    assert plain.token_ids.tolist() == parts.token_ids.tolist()
    expected = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHow many circles?"
    expected += "<|im_end|>\n<|im_start|>assistant\n"
    assert encoder.tokenizer.decode(plain.token_ids) == expected
    assert plain.positions.tolist() == [list(range(len(plain.token_ids)))] * 3
    assert plain.next_position == len(plain.token_ids)
    assert plain.images == () and len(plain.image_slots) == 0


def test_banned_and_end_tokens_are_found_by_their_names(processor):
    assert processor.banned_ids == tuple(sorted(oracle.token_id(token) for token in oracle.VISION_TOKENS))
    assert processor.end_ids == (oracle.token_id("<|im_end|>"), oracle.token_id("<|endoftext|>"))


def test_end_tokens_fall_back_to_the_config_and_then_the_tokenizer(tmp_path):
    folder = shutil.copytree(oracle.random_model("qwen2"), tmp_path / "model")
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 7}))
    assert Processor(folder).end_ids == (7,)
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    assert Processor(folder).end_ids == (oracle.token_id("<|im_end|>"),)


def test_text_is_tokenized_as_it_stands_and_decoded_without_special_tokens(processor):
    text = "  <think> $x$ </think> é\n"
    ids = processor.encode_text(text)
    assert ids.dtype == np.int32 and processor.decode(ids) == text
    assert processor.decode([*ids, oracle.token_id("<|im_end|>")]) == text


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|im_start|>", "<|vision_end|>", "<|endoftext|>"])
def test_the_literal_text_of_a_special_token_is_refused(processor, folder, token):
    assert reason(processor, f"what is {token}?", folder) == "special_token_in_text"
    assert token in processor.special_tokens


def test_a_prompt_at_the_limit_is_used_and_one_token_more_is_skipped(folder):
    model_folder = oracle.random_model("qwen2_5_vl")
    length = len(Processor(model_folder).encode(prompt(MIXED, folder)).token_ids)
    assert len(Processor(model_folder, max_prompt_tokens=length).encode(prompt(MIXED, folder)).token_ids) == length
    assert reason(Processor(model_folder, max_prompt_tokens=length - 1), MIXED, folder) == "prompt_too_long"


def test_a_text_too_long_is_skipped_before_its_images_are_fetched(folder):
    short = Processor(oracle.random_model("qwen2_5_vl"), max_prompt_tokens=20)
    content = [{"type": "text", "text": "long " * 100}, {"type": "image", "image": "none.png"}]
    assert reason(short, content, folder) == "prompt_too_long"


def test_a_prompt_with_more_images_than_the_sampler_takes_is_skipped(folder):
    processor = Processor(oracle.random_model("qwen2_5_vl"))
    several = [{"type": "image", "image": "c.png"}] * 2
    processor.max_images = 2
    assert len(processor.encode(prompt(several, folder)).images) == 2
    processor.max_images = 1
    assert reason(processor, several, folder) == "too_many_images"


def test_a_model_without_vision_skips_prompts_with_images(folder):
    assert reason(Processor(oracle.random_model("qwen2")), MIXED, folder) == "image_in_text_model"


def test_an_image_that_cannot_be_had_skips_its_prompt(processor, folder):
    assert reason(processor, [{"type": "image", "image": "none.png"}], folder) == "missing_image"


def test_messages_that_the_template_refuses_skip_their_prompt(tmp_path, folder):
    model_folder = shutil.copytree(oracle.random_model("qwen2"), tmp_path / "model")
    (model_folder / "chat_template.jinja").write_text("{{ raise_exception('only users, please') }}")
    assert reason(Processor(model_folder), "hello", folder) == "template_failed"


def test_an_older_folder_keeps_its_template_in_json(tmp_path, folder):
    model_folder = shutil.copytree(oracle.random_model("qwen2_5_vl"), tmp_path / "model")
    expected = Processor(model_folder).encode(prompt(MIXED, folder)).token_ids
    (model_folder / "chat_template.jinja").unlink()
    (model_folder / "chat_template.json").write_text(json.dumps({"chat_template": oracle.CHAT_TEMPLATE}))
    assert Processor(model_folder).encode(prompt(MIXED, folder)).token_ids.tolist() == expected.tolist()


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json"),
        (lambda f: (f / "tokenizer.json").write_text('{"half'), "tokenizer cannot be read"),
        (lambda f: (f / "config.json").unlink(), "config.json"),
        (lambda f: (f / "preprocessor_config.json").write_text("{"), "preprocessor_config.json"),
        (lambda f: (f / "preprocessor_config.json").write_text('{"patch_size": 16}'), "patch_size"),
    ],
)
def test_a_broken_model_folder_is_one_line_that_names_the_file(tmp_path, spoil, words):
    model_folder = shutil.copytree(oracle.random_model("qwen2_5_vl"), tmp_path / "model")
    spoil(model_folder)
    with pytest.raises((UserError, CheckpointError)) as caught:
        Processor(model_folder)
    assert words in str(caught.value) and str(model_folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("limits", [{"max_pixels": 100}, {"min_pixels": 5000, "max_pixels": 4000}])
def test_pixel_limits_that_make_no_sense_are_refused(limits):
    with pytest.raises(UserError, match="data.m.._pixels"):
        Processor(oracle.random_model("qwen2_5_vl"), **limits)
