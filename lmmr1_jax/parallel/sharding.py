"""Which axis of which array is split over which devices.

The mesh has three axes. `data` splits rows and copies weights; `fsdp` splits rows and weights, gathering a weight
when it is used; `tensor` splits heads and the feed-forward width, so that a device computes a part of every product.
A parameter names its axes by what they are ("heads", "mlp", ...) and `ShardingRules` says where such an axis goes;
to shard differently, change the rules and nothing else. The axes are Auto: XLA puts in the collectives, and what is
written here changes speed and memory, never a result.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lmmr1_jax.config.schema import MeshConfig
from lmmr1_jax.runtime.errors import UserError
from lmmr1_jax.types.batches import PackedBatch, VisionBatch

_log = logging.getLogger(__name__)

LogicalAxes = tuple[str | None, ...]

ROWS = ("data", "fsdp")


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """The mesh axis of every logical axis of a parameter; None keeps it whole on every device.

    In[B_data,fsdp, D] . W[D_fsdp, F_tensor] -> Out[B_data,fsdp, F_tensor]: W is gathered over fsdp before the
    product, and the product after it, with its F axis split over tensor, is summed over tensor.
    """

    layers: str | None = None
    embed: str | None = "fsdp"
    heads: str | None = "tensor"
    kv_heads: str | None = "tensor"
    mlp: str | None = "tensor"
    vocab: str | None = "tensor"
    vision_embed: str | None = "fsdp"
    vision_heads: str | None = "tensor"
    vision_mlp: str | None = "tensor"
    patch: str | None = None


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh ("data", "fsdp", "tensor") over the first devices that the config asks for.

    At most one axis may be -1: it takes all the devices that the others leave. Raises UserError for sizes that the
    devices can't fill.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": config.data, "fsdp": config.fsdp, "tensor": config.tensor}
    open_axes = [name for name, size in sizes.items() if size == -1]
    wrong = [f"mesh.{name}={size}" for name, size in sizes.items() if size < 1 and size != -1]
    if wrong or len(open_axes) > 1:
        raise UserError(f"{', '.join(wrong) or 'mesh'}: sizes are positive, and one of them may be -1 for the rest")
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    if open_axes:
        if len(devices) % fixed:
            raise UserError(f"mesh: {len(devices)} devices can't be divided by {fixed}, the other axes' product")
        sizes[open_axes[0]] = len(devices) // fixed
    count = int(np.prod(list(sizes.values())))
    if count > len(devices):
        raise UserError(f"mesh: {sizes} needs {count} devices, there are {len(devices)}")
    if count < len(devices):
        _log.warning("the mesh %s uses %d of %d devices", sizes, count, len(devices))
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * 3, devices=devices[:count])


def spec_of(
    shape: Sequence[int],
    axes: LogicalAxes,
    mesh: Mesh,
    rules: ShardingRules | None = None,
    num_heads: Mapping[str, int] | None = None,
) -> tuple[PartitionSpec, list[str]]:
    """The partition of one parameter, and what could not be split as the rules say.

    An axis stays whole when its length, or its number of heads, is no multiple of the mesh axis.

    Args:
      shape: the parameter's shape.
      axes: its logical axes, one per dimension.
      num_heads: the number of heads that a logical axis holds, from `weights_bridge.architecture.num_heads_by_axis`.
        The axis itself is longer, heads times their width; half a head on a device would compute the right thing
        slowly.
    """
    rules = rules or ShardingRules()
    spec: list[str | None] = []
    refused = []
    for length, axis in zip(shape, axes, strict=True):
        mesh_axis = getattr(rules, axis) if axis is not None else None
        if mesh_axis is None or mesh_axis in spec or mesh.shape[mesh_axis] == 1:
            spec.append(None)
            continue
        size = mesh.shape[mesh_axis]
        count = (num_heads or {}).get(axis, length)
        if count % size or length % size:
            refused.append(f"{axis} ({count}) over {mesh_axis}={size}")
            spec.append(None)
        else:
            spec.append(mesh_axis)
    return PartitionSpec(*spec), refused


def parameter_shardings(
    shapes: Any,
    axes: Any,
    mesh: Mesh,
    rules: ShardingRules | None = None,
    num_heads: Mapping[str, int] | None = None,
) -> Any:
    """A NamedSharding for every leaf of a parameter tree; logs, once, the axes that had to stay whole.

    Args:
      shapes: the tree, of arrays or `jax.ShapeDtypeStruct`s.
      axes: the same nested dict with a tuple of logical names at every leaf, from
        `weights_bridge.tensor_table.logical_axes`.
      mesh, rules, num_heads: as in `spec_of`.
    """
    kept_whole: set[str] = set()

    def shard(leaf, names):
        spec, refused = spec_of(leaf.shape, names, mesh, rules, num_heads)
        kept_whole.update(refused)
        return NamedSharding(mesh, spec)

    result = jax.tree.map(shard, shapes, axes)
    if kept_whole:
        _log.warning("copied to every device instead of split, for want of divisibility: %s", sorted(kept_whole))
    return result


def sharding_of(mesh: Mesh, rules: ShardingRules | None = None, num_heads: Mapping[str, int] | None = None):
    """What `weights_bridge.load` asks for every leaf: a function (path, shape, axes) -> NamedSharding."""

    def of_leaf(path: tuple[str, ...], shape: Sequence[int], axes: LogicalAxes) -> NamedSharding:
        return NamedSharding(mesh, spec_of(shape, axes, mesh, rules, num_heads)[0])

    return of_leaf


def row_shards(mesh: Mesh) -> int:
    """Devices that a micro-batch's rows are split over; its number of rows should be a multiple of this."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_shardings(batch: PackedBatch, mesh: Mesh) -> PackedBatch:
    """A sharding for every array of the batch: rows over data and fsdp, the micro-batch axis whole.

    Rows that the devices don't divide stay whole.
    """
    shards = row_shards(mesh)

    def over_rows(array, row_axis: int):
        if array.ndim <= row_axis or shards == 1 or array.shape[row_axis] % shards:
            return NamedSharding(mesh, PartitionSpec())
        return NamedSharding(mesh, PartitionSpec(*[None] * row_axis, ROWS))

    fields = {}
    for field in dataclasses.fields(PackedBatch):
        value = getattr(batch, field.name)
        if isinstance(value, VisionBatch):
            value = jax.tree.map(lambda array: over_rows(array, 1), value)
        elif value is not None:
            value = over_rows(value, 2 if field.name == "positions" else 1)
        fields[field.name] = value
    return PackedBatch(**fields)


def put_batch(batch: PackedBatch, mesh: Mesh) -> PackedBatch:
    """The batch on its devices, split by `batch_shardings`."""
    return jax.device_put(batch, batch_shardings(batch, mesh))


def constrain_rows(array: jax.Array, mesh: Mesh) -> jax.Array:
    """Inside jit: say that the leading axis, rows, is split over data and fsdp and all other axes are whole."""
    if mesh.size == 1 or array.shape[0] % row_shards(mesh):
        return array
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, PartitionSpec(ROWS)))


def activation_constraint(mesh: Mesh) -> Callable[[jax.Array, LogicalAxes], jax.Array]:
    """What `models.network.build` calls with activations whose leading axis is "batch": they stay split by rows."""

    def constrain(array: jax.Array, axes: LogicalAxes) -> jax.Array:
        return constrain_rows(array, mesh) if axes[0] == "batch" else array

    return constrain
