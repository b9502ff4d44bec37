"""The bridge's table and the Flax models name the same leaves with the same shapes, without knowing each other."""

import jax
import pytest
from random_checkpoint import CASES, config_of, random_tensors, table, write_checkpoint

from lmmr1_jax.models.network import build
from weights_bridge.config_json import read_architecture
from weights_bridge.tensor_table import leaves, nest


@pytest.mark.parametrize(("kind", "tied"), CASES)
def test_the_table_fills_exactly_the_parameters_of_the_network(tmp_path, kind, tied):
    config = config_of(kind, tied)
    folder = write_checkpoint(tmp_path, config, random_tensors(config))
    network = build(read_architecture(folder))
    wanted = jax.tree.map(lambda leaf: tuple(leaf.shape), network.abstract_params)
    assert nest({path: leaf.shape for path, leaf in leaves(table(config)).items()}) == wanted
