"""A run's folder: what a run leaves in it that wrong input ends, or that is stopped."""

import dataclasses
import json

import pytest

from lmmr1_jax.config.schema import RunConfig, TrainConfig
from lmmr1_jax.run.folder import LAYOUT, open_run_folder
from lmmr1_jax.runtime.errors import SamplingFailed, UserError
from lmmr1_jax.runtime.stop_signal import StopRequested
from weights_bridge.errors import CheckpointError, TransportError


def opened(folder, **fields):
    return open_run_folder(dataclasses.replace(TrainConfig(), run=RunConfig(dir=str(folder), **fields)))


@pytest.mark.parametrize("error", [UserError, CheckpointError, TransportError])
def test_wrong_input_leaves_no_folder_behind(tmp_path, error):
    for _ in range(2):
        with pytest.raises(error, match="no such model"), opened(tmp_path / "run") as folder:
            (folder / "skipped.jsonl").touch()
            raise error("no such model")
        assert not (tmp_path / "run").exists()


def test_a_run_that_is_stopped_before_it_has_done_anything_leaves_no_folder_behind(tmp_path):
    with pytest.raises(StopRequested), opened(tmp_path / "run") as folder:
        (folder / "config.json").touch()
        raise StopRequested("SIGINT")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("work", ["checkpoints/0", "evaluations.jsonl", "metrics.jsonl"])
def test_what_a_stopped_run_goes_on_from_is_never_removed(tmp_path, work):
    with pytest.raises(SamplingFailed), opened(tmp_path / "run") as folder:
        (folder / work).mkdir()
        raise SamplingFailed("no engine is left")
    assert (tmp_path / "run" / work).exists()
    with pytest.raises(UserError, match="is not empty"), opened(tmp_path / "run"):
        pass
    with opened(tmp_path / "run", resume=True):
        pass


@pytest.mark.parametrize("described", [{"data": {"message_key": "message"}}, {"layout": LAYOUT + 1}])
def test_a_run_of_another_layout_is_not_resumed_and_left_as_it_was(tmp_path, described):
    (tmp_path / "checkpoints" / "20" / "state").mkdir(parents=True)
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=f"a run of layout {described.get('layout', 1)}.*weights_bridge.export"):
        with opened(tmp_path, resume=True):
            pass
    assert json.loads((tmp_path / "config.json").read_text()) == described


@pytest.mark.parametrize("described", [json.dumps({"layout": LAYOUT}), "", "[]"])
def test_a_run_of_this_layout_or_of_half_a_description_is_resumed(tmp_path, described):
    (tmp_path / "checkpoints" / "20").mkdir(parents=True)
    (tmp_path / "config.json").write_text(described)
    with opened(tmp_path, resume=True) as folder:
        assert folder == tmp_path


def test_without_a_checkpoint_there_is_nothing_that_another_layout_could_spoil(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with opened(tmp_path, resume=True):
        pass
