"""A packed micro-batch through the model in the compute dtype of accelerators."""

import jax
import jax.numpy as jnp
import numpy as np
import packed_cases as cases
import pytest

from lmmr1_jax.config.schema import MeshConfig
from lmmr1_jax.models.packed_forward import micro_batch, response_hidden
from lmmr1_jax.parallel.sharding import make_mesh
from weights_bridge.config_json import parse_architecture


@pytest.mark.parametrize("vision", [True, False])
def test_bfloat16_hidden_states_stay_near_the_float32_ones(vision):
    config = parse_architecture(cases.hf_config(vision=vision, tied=vision))
    batch = cases.pack_by_hand(cases.random_rollouts(config), config, rows=4)
    mesh = make_mesh(MeshConfig(1, 1, 1))
    hidden = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        network = cases.network(config, compute_dtype=dtype)
        run = jax.jit(lambda p, b, n=network: response_hidden(n.bind(p), micro_batch(b, 0), mesh))
        hidden[dtype] = run(cases.random_params(network), batch)
        assert hidden[dtype].dtype == dtype
    held = batch.mask[0] > 0
    exact, rough = (np.asarray(x, np.float32)[held] for x in (hidden[jnp.float32], hidden[jnp.bfloat16]))
    assert 0 < np.linalg.norm(rough - exact) < 0.03 * np.linalg.norm(exact)
