"""The task of the embedded default: count coloured shapes in a generated image.

An image is a 3x3 grid of 28-pixel cells, so that each merged image token of a Qwen-VL (2x2 patches of 14 pixels)
is one cell. A cell is empty or holds a circle, a square or a triangle in one of four colours. Questions ask for the
shapes of one colour, or for those of two colours added up. Prompts are worded as LMM-R1's: its system prompt, then
the question and after it the image; the gold answer is `$\\boxed{N}$`.

Everything is a pure function of (split, seed, index). The two splits share no image: each layout of colours has a
checksum, and layouts whose checksum is 0 belong to "heldout", all others to "train".
"""

from __future__ import annotations

import base64
import dataclasses
import io
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw

from lmmr1_jax.types.records import Prompt

Split = Literal["train", "heldout"]

SYSTEM_PROMPT = (
    "Solve the question. The user asks a question, and you solves it. You first thinks about the reasoning process in "
    "the mind and then provides the user with the answer. The answer is in latex format and wrapped in $...$. The "
    "final answer must be wrapped using the \\boxed{} command. The reasoning process and answer are enclosed within "
    "<think> </think> and <answer> </answer> tags, respectively, i.e., <think> Since $1+1=2$, so the answer is $2$. "
    "</think><answer> The answer is $\\boxed{2}$ </answer>, which means assistant's output should start with <think> "
    "and end with </answer>."
)
"""LMM-R1's, word for word, grammar included."""

GRID, CELL = 3, 28
COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (40, 80, 220), "yellow": (240, 200, 30)}
KINDS = ("circle", "square", "triangle")
COUNT_QUESTIONS = ("How many {} shapes are in the picture?", "Count the {} shapes in the picture.")
ADD_QUESTIONS = (
    "How many {} and {} shapes are in the picture?",
    "What is the number of {} shapes plus the number of {} shapes?",
)

_EMPTY_SHARE, _ADD_SHARE = 0.25, 1 / 3
_CHECKSUM_MODULUS, _PAPER = 8, (244, 244, 240)


@dataclasses.dataclass(frozen=True)
class Scene:
    """An image to draw and a question about it.

    Attributes:
      colours: int `[3, 3]`, index into `COLOURS`, -1 where the cell is empty.
      kinds: int `[3, 3]`, index into `KINDS`; without meaning where the cell is empty.
      offsets: int `[3, 3, 2]`, how far in pixels the shape sits right of and below the middle of its cell.
      radii: int `[3, 3]`, half the shape's extent in pixels.
      asked: the colours that the question adds up, one or two names.
      question: its words.
    """

    colours: np.ndarray
    kinds: np.ndarray
    offsets: np.ndarray
    radii: np.ndarray
    asked: tuple[str, ...]
    question: str

    @property
    def row_counts(self) -> list[int]:
        """How many shapes of the asked colours stand in each row, from the top."""
        names = list(COLOURS)
        return [int(sum(row == names.index(name) for name in self.asked).sum()) for row in self.colours]

    @property
    def answer(self) -> int:
        return sum(self.row_counts)


def is_heldout(colours: np.ndarray) -> bool:
    """Whether a layout of colours `[3, 3]` belongs to the held-out split."""
    return int(np.dot(np.arange(1, colours.size + 1), colours.ravel() + 1)) % _CHECKSUM_MODULUS == 0


def draw_scene(split: Split, index: int, seed: int = 0) -> Scene:
    """The scene number `index` of a split; redrawn until its layout belongs to the split."""
    rng = np.random.default_rng([seed, index, split == "heldout"])
    shape = (GRID, GRID)
    while True:
        colours = np.where(rng.random(shape) < _EMPTY_SHARE, -1, rng.integers(len(COLOURS), size=shape))
        if is_heldout(colours) == (split == "heldout"):
            break
    adds = rng.random() < _ADD_SHARE
    names = list(COLOURS)
    asked = tuple(names[i] for i in rng.permutation(len(names))[: 2 if adds else 1])
    question = str(rng.choice(ADD_QUESTIONS if adds else COUNT_QUESTIONS)).format(*asked)
    return Scene(
        colours=colours,
        kinds=rng.integers(len(KINDS), size=shape),
        offsets=rng.integers(-2, 3, size=(*shape, 2)),
        radii=rng.integers(8, 12, size=shape),
        asked=asked,
        question=question,
    )


def draw_image(scene: Scene) -> Image.Image:
    """The scene as an RGB image of 84x84 pixels: a multiple of 28, so that no processor resizes it."""
    image = Image.new("RGB", (GRID * CELL, GRID * CELL), _PAPER)
    draw = ImageDraw.Draw(image)
    inks = list(COLOURS.values())
    for row, column in zip(*np.nonzero(scene.colours >= 0), strict=True):
        right, down = (int(v) for v in scene.offsets[row, column])
        x, y, r = column * CELL + CELL // 2 + right, row * CELL + CELL // 2 + down, int(scene.radii[row, column])
        ink = inks[scene.colours[row, column]]
        match KINDS[scene.kinds[row, column]]:
            case "circle":
                draw.ellipse((x - r, y - r, x + r, y + r), fill=ink)
            case "square":
                draw.rectangle((x - r, y - r, x + r, y + r), fill=ink)
            case "triangle":
                draw.polygon(((x, y - r), (x - r, y + r), (x + r, y + r)), fill=ink)
    return image


def shape_rows(split: Split, count: int, seed: int = 0, start: int = 0) -> list[dict[str, Any]]:
    """Rows `start` to `start + count` of a split, as a prompt file would hold them (`message`, `answer`,
    `data_source`, `id`); images are PNGs in `data:` URIs."""
    rows = []
    for index in range(start, start + count):
        scene = draw_scene(split, index, seed)
        png = io.BytesIO()
        draw_image(scene).save(png, "PNG", compress_level=1)
        uri = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
        rows.append(
            {
                "message": [
                    {"role": "system", "content": SYSTEM_PROMPT},
                    {
                        "role": "user",
                        "content": [{"type": "text", "text": scene.question}, {"type": "image", "image": uri}],
                    },
                ],
                "answer": f"$\\boxed{{{scene.answer}}}$",
                "data_source": "shapes-add" if len(scene.asked) > 1 else "shapes-count",
                "id": f"shapes-{split}-{seed}-{index}",
            }
        )
    return rows


def shape_prompts(split: Split, count: int, seed: int = 0, start: int = 0) -> list[Prompt]:
    """The same rows as prompts, ready for the processor: what reading them from a file would give."""
    rows = shape_rows(split, count, seed, start)
    return [
        Prompt(
            messages=row["message"],
            label=row["answer"],
            prompt_id=row["id"],
            data_source=row["data_source"],
            file=f"shapes-{split}",
            row=start + i,
        )
        for i, row in enumerate(rows)
    ]
