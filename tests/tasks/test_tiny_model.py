"""The tiny model that ships with the package: whole, small, in the right form, and with something left to learn."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from lmmr1_jax.data.processor import Processor
from lmmr1_jax.models.network import build
from lmmr1_jax.rewards.rules.grading import grade
from lmmr1_jax.rollout.loaded_model import TINY_MODEL
from lmmr1_jax.rollout.local.sampler import JaxSampler, sampling_key
from lmmr1_jax.rollout.sampler import SamplingSettings, sample
from lmmr1_jax.tasks.shapes import COLOURS, draw_scene, shape_prompts
from weights_bridge.load import load

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_tiny_model.py"


@pytest.fixture(scope="module")
def processor():
    return Processor(TINY_MODEL)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_tiny_model", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sampler(processor):
    made = JaxSampler(
        build(processor.config),
        banned_ids=processor.banned_ids,
        end_ids=processor.end_ids,
        patches_of=processor.patches,
    )
    made.load(load(TINY_MODEL))
    return made


def _grades(sampler, processor, n: int, temperature: float) -> np.ndarray:
    """Accuracy and format, `[128, n, 2]`, on the first held-out prompts."""
    encoded = [processor.encode(prompt) for prompt in shape_prompts("heldout", 128)]
    groups = sample(
        sampler, encoded, n, SamplingSettings(max_new_tokens=20, key=sampling_key(0, 0), temperature=temperature)
    )
    return np.array(
        [
            [grade(processor.decode(c.token_ids), e.prompt.label, "default") for c in group]
            for e, group in zip(encoded, groups, strict=True)
        ]
    )


def test_the_shipped_folder_stays_under_8_megabytes():
    assert sum(path.stat().st_size for path in TINY_MODEL.rglob("*")) < 8_000_000


def test_greedy_decoding_starts_in_form_and_right_part_of_the_time(sampler, processor):
    accuracy, form = _grades(sampler, processor, 1, 0.0).mean((0, 1))
    assert form > 0.97
    assert 0.3 < accuracy < 0.6


def test_samples_hold_right_answers_that_greedy_decoding_misses(sampler, processor):
    greedy, sampled = _grades(sampler, processor, 1, 0.0)[..., 0], _grades(sampler, processor, 8, 1.0)[..., 0]
    assert sampled.max(1).mean() > greedy.mean() + 0.25


def test_prompts_of_the_task_are_short_and_colours_are_single_tokens(processor):
    assert all(len(processor.encode(prompt).token_ids) < 96 for prompt in shape_prompts("train", 20))
    ids = {color: processor.encode_text(f" {color}") for color in COLOURS}
    assert all(len(i) == 1 for i in ids.values())
    for index in range(20):
        scene = draw_scene("train", index)
        question = processor.encode_text(scene.question)
        assert [color for color, i in ids.items() if i[0] in question] == sorted(scene.asked, key=list(COLOURS).index)


@pytest.mark.parametrize("text", ["Wörld 123\n x^2", "<think> $0+1=1$ </think>", "a  b\t\n\nc", "日本 {}$$"])
def test_the_tokenizer_gives_any_text_back(processor, text):
    assert processor.decode(processor.encode_text(text)) == text


def test_the_script_makes_the_shipped_tokenizer_and_config_again(script, processor, tmp_path):
    script.write_side_files(tmp_path)
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_text() == (TINY_MODEL / name).read_text(), name


def test_careful_demonstrations_are_right_and_hasty_ones_forget_the_last_row(script):
    for index in range(200):
        scene = draw_scene("train", index)
        label = f"$\\boxed{{{scene.answer}}}$"
        assert grade(script.demonstration(scene, hasty=False), label, "lmm-r1") == (1.0, 1.0)
        hasty = grade(script.demonstration(scene, hasty=True), label, "lmm-r1")
        assert hasty == (float(scene.row_counts[2] == 0), 1.0)


def test_transformers_opens_the_shipped_folder_and_writes_the_same(sampler, processor):
    torch = pytest.importorskip("torch")
    import oracle

    model = oracle.load_model(TINY_MODEL)
    prompts = [processor.encode(prompt) for prompt in shape_prompts("heldout", 2)]
    ours = sample(sampler, prompts, 1, SamplingSettings(max_new_tokens=20, key=sampling_key(0, 0), temperature=0.0))
    for encoded, (completion,) in zip(prompts, ours, strict=True):
        image = encoded.images[0]
        ids = torch.tensor(encoded.token_ids, dtype=torch.long)[None]
        inputs = dict(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == processor.config.image_token_id).int(),
            pixel_values=torch.from_numpy(processor.patches(image)),
            image_grid_thw=torch.tensor([image.grid_thw]),
        )
        with torch.no_grad():
            written = model.generate(
                **inputs, max_new_tokens=20, do_sample=False, suppress_tokens=list(processor.banned_ids)
            )
        assert written[0, len(encoded.token_ids) :].tolist() == completion.token_ids.tolist()
