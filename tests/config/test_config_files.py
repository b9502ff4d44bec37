"""What stands in configs/ can be run, as far as a config alone decides that."""

from pathlib import Path

import pytest

from lmmr1_jax.algorithms import registry
from lmmr1_jax.config.command_line import parse_train_config

CONFIGS = Path(__file__).parents[2] / "configs"
BASES = ("embedded",)  # which other files build on, and which export no config
NAMES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.py") if path.stem not in BASES)


@pytest.mark.parametrize("name", NAMES)
def test_every_config_file_loads_is_in_range_and_sets_only_what_its_algorithm_reads(name):
    registry.checked(parse_train_config(["--config", str(CONFIGS / name)]))


def test_no_two_config_files_write_to_the_same_folder():
    folders = [parse_train_config(["--config", str(CONFIGS / name)]).run.dir for name in NAMES]
    assert len(set(folders)) == len(NAMES)
