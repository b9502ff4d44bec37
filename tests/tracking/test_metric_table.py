"""docs/metrics.md is the one table of metric names; what the tracker writes stands there."""

import re
from pathlib import Path

from tracking.rollout_samples import group

from lmmr1_jax.tracking.rollout_metrics import rollout_metrics

TABLE = Path(__file__).parents[2] / "docs" / "metrics.md"
ROW = re.compile(r"^\| `([^`]+)` \| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)

# What scripts and people outside rely on.
PROMISED = (
    "step reward/mean reward/accuracy reward/format completion/length completion/truncated kl loss/policy grad_norm "
    "learning_rate gap/mean gap/max tokens_per_second time/rollout time/score time/learn time/sync compiled_programs "
    "skipped"
).split()


def test_the_table_names_every_promised_metric_once():
    names = [name for name, _, _ in ROW.findall(TABLE.read_text())]
    assert len(names) == len(set(names))
    assert set(PROMISED) <= set(names)


def test_what_rollouts_and_tracker_write_stands_in_the_table():
    names = {name for name, _, _ in ROW.findall(TABLE.read_text())}
    assert set(rollout_metrics([group()])) | {"time/elapsed", "tracking/failures"} <= names
