"""What is skipped is counted and written, and a resumed run's record is that of a run that never stopped."""

import json

from lmmr1_jax.data.skips import SkipLog


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_record_is_on_disk_as_soon_as_it_is_added(tmp_path):
    skips = SkipLog(tmp_path / "skipped.jsonl")
    skips.add("set.jsonl", 4, "no_answer", "the row has none")
    assert lines(tmp_path / "skipped.jsonl") == [
        {"file": "set.jsonl", "row": 4, "reason": "no_answer", "detail": "the row has none"}
    ]
    assert skips.counts == {"no_answer": 1} and skips.total == 1


def test_resuming_cuts_the_record_back_to_the_checkpoint(tmp_path):
    path = tmp_path / "skipped.jsonl"
    first = SkipLog(path)
    first.add("set", 1, "bad_json", "at load")
    first.add("set", 2, "broken_image", "before the checkpoint")
    state = json.loads(json.dumps(first.state_dict()))
    first.add("set", 3, "broken_image", "after it")
    resumed = SkipLog(path, keep=True)
    resumed.add("set", 1, "bad_json", "at load")
    resumed.load_state_dict(state)
    assert [r["row"] for r in lines(path)] == [1, 2]
    assert resumed.counts == {"bad_json": 1, "broken_image": 1}
    resumed.add("set", 3, "broken_image", "after it")
    assert [r["row"] for r in lines(path)] == [1, 2, 3]


def test_a_fresh_log_starts_empty(tmp_path):
    path = tmp_path / "skipped.jsonl"
    SkipLog(path).add("set", 1, "bad_json", "")
    SkipLog(path)
    assert path.read_bytes() == b""
