"""The generated task: what the images show is what the answers count, and the splits share nothing."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from lmmr1_jax.tasks.shapes import (
    CELL,
    COLOURS,
    GRID,
    SYSTEM_PROMPT,
    draw_image,
    draw_scene,
    is_heldout,
    shape_prompts,
    shape_rows,
)


def _seen_colours(image: Image.Image) -> np.ndarray:
    """The colours `[3, 3]` that a cell-by-cell look at the pixels finds, -1 for an empty cell."""
    pixels = np.asarray(image).reshape(GRID, CELL, GRID, CELL, 3).swapaxes(1, 2).reshape(GRID, GRID, -1, 3)
    matches = np.stack([(pixels == ink).all(-1).sum(-1) for ink in COLOURS.values()], -1)
    return np.where(matches.max(-1) > 0, matches.argmax(-1), -1)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_answer_is_the_number_of_shapes_in_the_image(split):
    names = list(COLOURS)
    for index in range(100):
        scene = draw_scene(split, index)
        seen = _seen_colours(draw_image(scene))
        assert scene.answer == sum(int((seen == names.index(name)).sum()) for name in scene.asked)
        assert all(name in scene.question for name in scene.asked)
        assert not any(name in scene.question for name in set(names) - set(scene.asked))


def test_no_shape_reaches_into_another_cell():
    for index in range(50):
        scene = draw_scene("train", index)
        assert np.array_equal(_seen_colours(draw_image(scene)), scene.colours)
        pixels = np.asarray(draw_image(scene)).reshape(GRID, CELL, GRID, CELL, 3).swapaxes(1, 2)
        for cell in pixels.reshape(-1, CELL * CELL, 3):
            assert len(np.unique(cell, axis=0)) <= 2


def test_train_and_heldout_layouts_are_disjoint_by_their_checksum():
    for seed in (0, 1):
        for index in range(200):
            assert not is_heldout(draw_scene("train", index, seed).colours)
            assert is_heldout(draw_scene("heldout", index, seed).colours)


def test_heldout_questions_and_answers_are_distributed_like_the_training_ones():
    answers = [[draw_scene(split, index).answer for index in range(2000)] for split in ("train", "heldout")]
    train, heldout = (np.bincount(a, minlength=10) / len(a) for a in answers)
    assert np.abs(train - heldout).max() < 0.05
    assert train.max() < 0.35  # no answer is worth guessing always


def test_a_row_depends_on_its_split_seed_and_index_alone():
    assert shape_rows("train", 3, start=5) == shape_rows("train", 8)[5:]
    assert shape_rows("train", 2, seed=1) != shape_rows("train", 2, seed=0)
    assert shape_rows("heldout", 2) != shape_rows("train", 2)


def test_rows_are_worded_as_lmm_r1_words_them():
    for row in shape_rows("train", 20):
        system, user = row["message"]
        assert system == {"role": "system", "content": SYSTEM_PROMPT}
        text, image = user["content"]
        assert text["type"] == "text" and image["type"] == "image"
        uri = image["image"]
        assert uri.startswith("data:image/png;base64,")
        image = Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))
        assert image.size == (84, 84) and image.mode == "RGB"
        assert row["answer"].startswith("$\\boxed{") and row["answer"].endswith("}$")
        assert row["data_source"] in ("shapes-count", "shapes-add")


def test_prompts_are_the_rows_with_unique_ids():
    prompts, rows = shape_prompts("train", 20, start=3), shape_rows("train", 20, start=3)
    assert [p.label for p in prompts] == [r["answer"] for r in rows]
    assert [p.messages for p in prompts] == [r["message"] for r in rows]
    assert [p.row for p in prompts] == list(range(3, 23))
    assert len({p.prompt_id for p in prompts}) == 20
