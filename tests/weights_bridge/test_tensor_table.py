"""The bridge's table and the Flax models name the same leaves with the same shapes, without knowing each other."""

import jax
import pytest
from random_checkpoint import CASES, config_of, random_tensors, write_checkpoint

from lmmr1_jax.models.config import read_config
from lmmr1_jax.models.network import build
from weights_bridge.tensor_table import layout, leaves, nest


@pytest.mark.parametrize(("kind", "tied"), CASES)
def test_the_table_fills_exactly_the_parameters_of_the_network(tmp_path, kind, tied):
    config = config_of(kind, tied)
    config |= {"rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "max_position_embeddings": 512}
    if kind != "qwen2":
        config |= {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 1]}}
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        config |= {name: 50 + number for number, name in enumerate(names)}
    folder = write_checkpoint(tmp_path, config, random_tensors(config))
    network = build(read_config(folder))
    wanted = jax.tree.map(lambda leaf: tuple(leaf.shape), network.abstract_params)
    assert nest({path: leaf.shape for path, leaf in leaves(layout(config)).items()}) == wanted
