"""What a person writes in files of their own, outside the package, as a run takes it from its command line."""

import json
from pathlib import Path

import whole_runs
from whole_runs import lines

SMALL = (
    "--config configs/demo/rloo.py --run.steps 2 --rollout.prompts 4 --rollout.completions 4 --eval.size 2 "
    "--tracking.tensorboard False"
).split()

ALGORITHM = """
import dataclasses

import jax.numpy as jnp
import numpy as np

from lmmr1_jax.algorithms.algorithm import Algorithm


def advantages(rollouts, config, log_ratios):
    '''The same for every token, whatever was earned.'''
    return [
        dataclasses.replace(r, advantages=tuple(np.full(c.token_ids.shape, 3, np.float32) for c in r.completions))
        for r in rollouts
    ]


def loss(inputs, config):
    '''A slope that the advantage has no part in, besides its size.'''
    return 0.5 * inputs.advantages + (inputs.log_probs - inputs.old_log_probs), jnp.ones_like(inputs.log_probs)


ALGORITHM = Algorithm("flat", advantages=advantages, loss=loss, smallest_group=1)
"""


VERIFIER = """
def half(answer: str, gold: str) -> float:
    return 0.25
"""


def test_an_algorithm_and_a_verifier_of_ones_own_train_a_run(tmp_path):
    (tmp_path / "flat.py").write_text(ALGORITHM)
    (tmp_path / "own.py").write_text(VERIFIER)
    folder = tmp_path / "run"
    own = ("--algorithm.file", str(tmp_path / "flat.py"), "--rewards.verifier", f"{tmp_path / 'own.py'}:half")
    done = whole_runs.train(folder, *SMALL, *own, "--algorithm.importance", "none")
    assert done.returncode == 0 and not done.stderr, done.stderr[-3000:]
    records = lines(folder / "metrics.jsonl")
    assert len(records) == 2
    for record in records:  # half of 3, and the learner is on its policy
        assert abs(record["loss/policy"] - 1.5) < 1e-5 and abs(record["clip_fraction"] - 1) < 1e-5
        assert record["grad_norm"] > 0
        assert 0 < record["reward/accuracy"] <= 0.25 and record["reward/faults"] == 0
    described = json.loads((folder / "config.json").read_text())["algorithm"]
    assert (described["name"], described["file"]) == ("flat", str(tmp_path / "flat.py"))


def test_a_file_without_an_algorithm_is_refused_in_one_line_before_a_folder_is_made(tmp_path):
    (tmp_path / "empty.py").touch()
    done = whole_runs.train(tmp_path / "run", *SMALL, "--algorithm.file", str(tmp_path / "empty.py"))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "empty.py exports no ALGORITHM" in done.stderr and not Path(tmp_path / "run").exists()
