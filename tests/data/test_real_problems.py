"""One pass over 200 real problems with images: every row is used or skipped with its reason."""

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")

import oracle  # noqa: E402

from lmmr1_jax.data.faults import REASONS  # noqa: E402
from lmmr1_jax.data.processor import Processor  # noqa: E402
from lmmr1_jax.data.prompt_loader import PromptLoader, encode_all  # noqa: E402
from lmmr1_jax.data.prompt_set import PromptCursor, read_prompts  # noqa: E402
from lmmr1_jax.data.skips import SkipLog  # noqa: E402

DATA = Path(__file__).parents[2] / ".." / "shared" / "data" / "mathvision200"

pytestmark = pytest.mark.skipif(not (DATA / "prompts.jsonl").is_file(), reason="../shared/data/mathvision200 is absent")


def read(path, processor, tmp_path):
    skips = SkipLog(tmp_path / "skipped.jsonl")
    return read_prompts(path, special_tokens=processor.special_tokens, skips=skips), skips


def skipped_rows(tmp_path):
    return [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]


def test_used_and_skipped_rows_add_up_and_each_skip_has_its_reason(tmp_path):
    processor = Processor(oracle.random_model("qwen2_5_vl"), max_pixels=200_704, max_prompt_tokens=2048)
    prompts, skips = read(DATA / "prompts.jsonl", processor, tmp_path)
    used = list(encode_all(prompts, processor, skips))
    skipped = skipped_rows(tmp_path)
    assert len(used) + len(skipped) == 200
    assert sorted([e.prompt.row for e in used] + [s["row"] for s in skipped]) == list(range(200))
    assert all(s["reason"] in REASONS and s["detail"] for s in skipped)
    assert len(used) >= 190
    assert all(e.images and len(e.token_ids) <= 2048 for e in used)


def test_rows_spoilt_in_every_way_are_skipped_each_for_its_reason_and_replaced(tmp_path):
    lines = (DATA / "prompts.jsonl").read_text().splitlines()[:40]
    rows = [json.loads(line) for line in lines]
    for row in rows:
        row["message"] = row["message"].replace('"images/', f'"{DATA.resolve()}/images/')
    rows[3] = "{broken"
    rows[5].pop("message")
    rows[7].pop("answer")
    rows[9]["message"] = json.dumps([{"role": "user", "content": "what is <|image_pad|>?"}])
    rows[11]["message"] = json.dumps([{"role": "user", "content": [{"type": "image", "image": "none.png"}]}])
    rows[13]["message"] = json.dumps([{"role": "user", "content": "too long " * 3000}])
    rows[15]["message"] = json.dumps([{"role": "user", "content": [{"type": "image", "image": "http://a.b/c.png"}]}])
    (tmp_path / "text.png").write_text("no image")
    rows[17]["message"] = json.dumps([{"role": "user", "content": [{"type": "image", "image": "text.png"}]}])
    path = tmp_path / "spoilt.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    processor = Processor(oracle.random_model("qwen2_5_vl"), max_pixels=50_176, max_prompt_tokens=2048)
    prompts, skips = read(path, processor, tmp_path)
    loader = PromptLoader(PromptCursor(prompts, seed=0, shuffle=False), processor, skips)
    used = [e.prompt.row for _ in range(4) for e in loader.take(8)]
    loader.close()
    spoilt = {
        3: "bad_json",
        5: "no_message",
        7: "no_answer",
        9: "special_token_in_text",
        11: "missing_image",
        13: "prompt_too_long",
        15: "forbidden_path",
        17: "broken_image",
    }
    assert {s["row"]: s["reason"] for s in skipped_rows(tmp_path)} == spoilt
    assert used == [row for row in range(40) if row not in spoilt]
