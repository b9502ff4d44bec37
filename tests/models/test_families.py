"""A family that another package registers is loaded, built and computed with like those that are here."""

import dataclasses

import jax
import numpy as np
import pytest
from random_checkpoint import config_of, random_tensors, write_checkpoint

from lmmr1_jax.models import families
from lmmr1_jax.models.attention.mask import causal_intervals
from lmmr1_jax.models.network import build
from lmmr1_jax.models.positions import prompt_positions
from lmmr1_jax.runtime.errors import UserError
from weights_bridge.config_json import read_architecture
from weights_bridge.errors import CheckpointError
from weights_bridge.families import registry
from weights_bridge.load import load


def logits(folder) -> np.ndarray:
    """Of a short text, by way of everything that asks for the family."""
    network, params = build(read_architecture(folder)), load(folder)
    tokens = np.arange(3, 15)
    positions, _ = prompt_positions(tokens, [], network.config)

    @jax.jit
    def compute(params):
        model, mask = network.bind(params), causal_intervals(np.asarray([len(tokens)]), len(tokens))
        hidden = model.hidden(model.embed(tokens[None]), positions[:, None], mask)
        return hidden @ model.head_embedding().T

    return np.asarray(compute(params))


def test_a_family_registered_from_outside_computes_what_its_relative_does(tmp_path, monkeypatch):
    config = config_of("qwen2", True)
    tensors = random_tensors(config)
    known = write_checkpoint(tmp_path / "known", config, tensors)
    # The same decoder, but for the name of a field and of a tensor.
    other = {"layers" if name == "num_hidden_layers" else name: value for name, value in config.items()}
    renamed = {name.replace("gate_proj", "gate"): tensor for name, tensor in tensors.items()}
    new = write_checkpoint(tmp_path / "new", other | {"model_type": "thin"}, renamed)
    with pytest.raises(CheckpointError, match="'thin' is not supported; supported: qwen2, qwen2_vl, qwen2_5_vl"):
        read_architecture(new)

    relative = registry.FAMILIES["qwen2"]

    def parse(raw):
        return relative.parse({**raw, "num_hidden_layers": raw["layers"]})

    def entries(model, with_head):
        for entry in relative.entries(model, with_head):
            yield dataclasses.replace(entry, hf_name=entry.hf_name.replace("gate_proj", "gate"))

    monkeypatch.setitem(registry.FAMILIES, "thin", registry.Family(parse, entries))
    with pytest.raises(UserError, match="'thin' has no modules here"):
        prompt_positions([3], [], read_architecture(new))
    monkeypatch.setitem(families.FAMILIES, "thin", families.FAMILIES["qwen2"])
    assert read_architecture(new).model_type == "thin"
    np.testing.assert_array_equal(logits(new), logits(known))


def test_both_registries_have_the_same_families():
    assert list(families.FAMILIES) == list(registry.FAMILIES)
