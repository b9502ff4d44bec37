"""Device count and mesh shape change speed, never the loss or the gradient, the policy's or its critic's; a checkpoint
goes on on any of them."""

from pathlib import Path

import pytest
from whole_runs import on_eight_devices

MESHES = ("data and tensor", "fsdp", "all")


@pytest.fixture(scope="module")
def found():
    return on_eight_devices(Path(__file__).parent / "eight_devices.py", ["--xla_backend_optimization_level=0"])


def test_eight_devices_are_simulated_and_gradients_are_accumulated(found):
    assert found["devices"] == 8 and found["micro_batches"] == 2


@pytest.mark.parametrize("mesh", MESHES)
def test_mesh_shape_leaves_loss_and_gradient_alone(found, mesh):
    assert found[mesh]["gradient"] <= 1e-5
    for name, (ours, theirs) in found[mesh]["metrics"].items():
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6), name


def test_mesh_shape_leaves_the_gradient_of_a_backbone_that_is_shared_with_a_critic_alone(found):
    assert found["shared"] <= 1e-5


@pytest.mark.parametrize("mesh, parts", zip(MESHES, (2, 8, 4), strict=True))
def test_weights_and_moments_are_split_as_the_rules_say(found, mesh, parts):
    whole, shard = found[mesh]["shard"]
    assert shard * parts == whole
    assert found[mesh]["moments_shard"] == shard


@pytest.mark.parametrize("mesh", MESHES)
def test_a_checkpoint_of_one_device_is_restored_bit_for_bit_on_another_mesh_and_goes_on(found, mesh):
    assert found[mesh]["restored_bits"]
    assert found[mesh]["went_on"] == 2


@pytest.mark.parametrize("mesh", MESHES)
def test_saving_a_sharded_state_compiles_nothing(found, mesh):
    assert found[mesh]["compiled_to_save"] == []
