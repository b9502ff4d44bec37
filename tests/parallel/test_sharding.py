"""The sharding rules, on meshes that need no devices."""

import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from lmmr1_jax.config.schema import MeshConfig
from lmmr1_jax.parallel.sharding import ShardingRules, make_mesh, spec_of
from lmmr1_jax.runtime.errors import UserError


def mesh(data=1, fsdp=1, tensor=1):
    return AbstractMesh((data, fsdp, tensor), ("data", "fsdp", "tensor"))


def test_a_kernel_is_split_as_its_axes_are_named():
    spec, refused = spec_of((8, 16, 32), ("layers", "embed", "mlp"), mesh(2, 2, 2))
    assert spec == PartitionSpec(None, "fsdp", "tensor") and not refused


def test_no_mesh_axis_is_used_twice():
    rules = ShardingRules(mlp="fsdp")
    assert spec_of((16, 32), ("embed", "mlp"), mesh(fsdp=4), rules)[0] == PartitionSpec("fsdp", None)


def test_an_axis_that_cannot_be_divided_stays_whole_and_is_named():
    spec, refused = spec_of((6, 32), ("embed", "mlp"), mesh(1, 4, 2))
    assert spec == PartitionSpec(None, "tensor")
    assert refused == ["embed (6) over fsdp=4"]


def test_a_head_is_never_cut_in_two():
    spec, refused = spec_of((16, 32), ("embed", "kv_heads"), mesh(1, 1, 4), num_heads={"kv_heads": 2})
    assert spec == PartitionSpec(None, None)
    assert refused == ["kv_heads (2) over tensor=4"]


def test_mesh_sizes_that_the_devices_cannot_fill_are_refused():
    with pytest.raises(UserError, match="one of them may be -1"):
        make_mesh(MeshConfig(data=-1, fsdp=-1))
    with pytest.raises(UserError, match="mesh.tensor=0"):
        make_mesh(MeshConfig(tensor=0))
    with pytest.raises(UserError, match="needs 64 devices"):
        make_mesh(MeshConfig(data=64, fsdp=1))


def test_the_open_axis_takes_the_devices_that_are_left():
    import jax

    assert make_mesh(MeshConfig()).shape["fsdp"] == jax.device_count()
