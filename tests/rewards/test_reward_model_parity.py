"""A reward model's scores are transformers': of its own class for text, of base model and score matrix for images."""

import json
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import oracle  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from lmmr1_jax.config.schema import LearnerConfig, MeshConfig  # noqa: E402
from lmmr1_jax.data.compatibility import check_fit  # noqa: E402
from lmmr1_jax.data.processor import Processor  # noqa: E402
from lmmr1_jax.parallel.sharding import make_mesh  # noqa: E402
from lmmr1_jax.rewards.sources.reward_model import RewardModel  # noqa: E402
from lmmr1_jax.types.records import Completion, Prompt, Rollout  # noqa: E402

LIMIT = 1e-4
PAD, END = oracle.token_id("<|endoftext|>"), oracle.token_id("<|im_end|>")
# Sizes of each prompt's images, words of its text, lengths of its completions.
GROUPS = [
    ([], 3, (5, 1, 12)),
    ([(83, 61), (140, 200)], 2, (0, 7)),
    ([(30, 30)], 40, (20, 3, 3, 9)),
    ([], 90, (1,)),
    ([(200, 57), (28, 28), (99, 120)], 5, (4, 11)),
]


@pytest.fixture(scope="module")
def processor():
    return Processor(oracle.random_model("qwen2_5_vl"))


@pytest.fixture(scope="module")
def rollouts(processor, tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    made = []
    for number, (sizes, words, lengths) in enumerate(GROUPS):
        content = []
        for index, size in enumerate(sizes):
            oracle.random_image(*size, seed=10 * number + index).save(folder / f"{number}-{index}.png")
            content.append({"type": "image", "image": f"{number}-{index}.png"})
        content.append({"type": "text", "text": "how many circles " * words})
        messages = [{"role": "user", "content": content}]
        prompt = Prompt(messages, "3", str(number), "s", str(folder / "x"), number, "math")
        completions = []
        for index, length in enumerate(lengths):
            ids = rng.integers(0, oracle.PLAIN_TOKENS, length)
            if length:
                ids[-1] = (END, PAD, 7)[index % 3]  # ended in either way, or cut
            completions.append(completion(ids))
        made.append(Rollout(processor.encode(prompt), tuple(completions)))
    return made


def completion(ids):
    ids = np.asarray(ids, np.int32)
    return Completion(ids, np.zeros(len(ids), np.float32), "stop", np.zeros_like(ids))


def open_model(folder, processor, **learner):
    return RewardModel(
        folder,
        make_mesh(MeshConfig()),
        compute_dtype=np.float32,
        image_format=check_fit(folder, processor),
        learner=LearnerConfig(**learner),
        max_new_tokens=20,
    )


def sequences(rollout):
    return [np.concatenate([rollout.encoded.token_ids, c.token_ids]) for c in rollout.completions]


def assert_close(ours, theirs):
    assert [len(group) for group in ours] == [len(group) for group in theirs]
    theirs = np.concatenate(theirs)
    assert np.std(theirs) > 0.1  # scores that say something
    np.testing.assert_allclose(np.concatenate(ours), theirs, rtol=0, atol=LIMIT)


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    config = oracle.hf_config("qwen2", tied=False)
    config.num_labels, config.pad_token_id = 1, PAD
    model = transformers.Qwen2ForSequenceClassification(config).float().eval()
    oracle.randomize(model, 3)
    model.save_pretrained(folder)
    oracle.write_side_files(folder, "qwen2")
    return folder, model


def test_text_scores_equal_those_of_a_padded_batch_of_transformers_own_class(text_model, rollouts, processor):
    folder, model = text_model
    ours = open_model(folder, processor).score(rollouts)
    rows = [row for rollout in rollouts for row in sequences(rollout)]
    ids = np.full((len(rows), max(map(len, rows))), PAD)
    mask = np.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = row, 1
    with torch.no_grad():
        scores = model(input_ids=torch.as_tensor(ids), attention_mask=torch.as_tensor(mask)).logits[:, 0].numpy()
    bounds = np.cumsum([len(rollout.completions) for rollout in rollouts])[:-1]
    assert_close(ours, np.split(scores, bounds))


def image_model(folder, kind, *, tied, base=False, pad=None):
    """The checkpoint that a trainer of reward models leaves: a base model's, and a score head."""
    source = oracle.random_model(kind, tied, seed=4)
    shutil.copytree(source, folder)
    if base:  # without the head, in the names that the base class has by itself
        oracle.load_model(source).model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    if pad is not None:
        config["text_config"]["pad_token_id"] = pad
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    width = config["text_config"]["hidden_size"]
    score = torch.randn((1, width), generator=torch.Generator().manual_seed(5)) * width**-0.5
    save_file(tensors | {"score.weight": score}, folder / "model.safetensors", metadata={"format": "pt"})
    return source, score


def image_scores(source, score, rollouts, processor, pad):
    base, scores = oracle.load_model(source).model, []
    for rollout in rollouts:
        images = rollout.encoded.images
        patches, grids = [processor.patches(p) for p in images], [p.grid_thw for p in images]
        scores.append([])
        for row in sequences(rollout):
            with torch.no_grad():
                inputs = oracle.hf_inputs(row, patches=patches, grids=grids)
                hidden = base(**inputs, use_cache=False).last_hidden_state[0]
            last = np.flatnonzero(row != pad)[-1] if pad is not None else -1
            scores[-1].append(float(hidden[last] @ score[0]))
    return scores


@pytest.mark.parametrize(
    ("kind", "tied", "base", "pad"),
    [
        ("qwen2_5_vl", True, False, None),
        ("qwen2_5_vl", False, True, PAD),
        ("qwen2_vl", False, False, PAD),
        ("qwen2_vl", True, True, None),
    ],
)
def test_image_scores_equal_the_base_model_and_the_score_matrix(
    tmp_path, rollouts, processor, kind, tied, base, pad
):
    source, score = image_model(tmp_path / "model", kind, tied=tied, base=base, pad=pad)
    ours = open_model(tmp_path / "model", processor).score(rollouts)
    assert_close(ours, image_scores(source, score, rollouts, processor, pad))


def test_neither_the_company_of_a_group_nor_how_it_is_packed_changes_its_scores(tmp_path, rollouts, processor):
    image_model(tmp_path / "model", "qwen2_5_vl", tied=True)
    model = open_model(tmp_path / "model", processor)
    together = model.score(rollouts)
    for rollout, scores in zip(rollouts, together, strict=True):
        np.testing.assert_allclose(model.score([rollout])[0], scores, rtol=0, atol=1e-5)
    backwards = model.score(rollouts[::-1])[::-1]
    copied = open_model(tmp_path / "model", processor, share_prompts=False, pack=False).score(rollouts)
    for other in (backwards, copied):
        np.testing.assert_allclose(np.concatenate(other), np.concatenate(together), rtol=0, atol=1e-5)
