"""A mesh with three axes: `data` replicates the model, `fsdp` shards parameters along width, `tensor` along heads."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tarflow_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # over which a batch is sharded
RULES = (("batch", BATCH_AXES), ("heads", "tensor"), ("hidden", "tensor"))  # the flow's logical axes


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh over all devices; at most one size may be -1, which takes the remaining devices.

    Only `data` spans several TPU slices, because the network between them is slow. Raises UserError if the sizes do not
    multiply to the number of devices, or `data` is no multiple of the slices.
    """
    devices = jax.devices() if devices is None else devices
    fixed = math.prod(size for size in (data, fsdp, tensor) if size > 0)
    sizes = [len(devices) // fixed if size == -1 else size for size in (data, fsdp, tensor)]
    if min(sizes) < 1 or math.prod(sizes) != len(devices):
        raise UserError(
            f"mesh data={data}, fsdp={fsdp}, tensor={tensor} does not cover {len(devices)} devices; "
            "the sizes must multiply to their number, and one may be -1"
        )
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    if sizes[0] % slices:
        raise UserError(f"mesh data={sizes[0]} does not divide by the {slices} slices; choose a multiple")
    inside = (sizes[0] // slices, *sizes[1:])
    # Physical axes may be split, because an axis of 8 takes one and a half of a 4 x 4 x 4 torus's.
    if slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh(inside, devices, allow_split_physical_axes=True)
    # Flax linen relies on automatic sharding propagation, which is not the default of jax.make_mesh.
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def default_device() -> jax.Device:
    """Returns the device of `jax.default_device`, or the first one."""
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    return device if isinstance(device, jax.Device) else jax.local_devices(backend=device)[0]


def many_devices() -> bool:
    """Returns whether the current mesh is `make_mesh`'s with several devices; False inside `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.axis_names == AXES and mesh.size > 1 and not mesh.manual_axes


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of rows over `data` and `fsdp`; other dimensions are not sharded."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that puts a copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


class LocalBatch:
    """The rows of a global batch that this process reads, because its devices hold them.

    Attributes:
      local: int64 [n], the indices of these rows in the global batch, ascending. Processes that differ only along
        `tensor` read the same rows.
    """

    def __init__(self, mesh: Mesh, batch_size: int) -> None:
        """Takes the global batch size, a multiple of data x fsdp."""
        self._sharding, self._batch_size = batch_sharding(mesh), batch_size
        slices = self._sharding.addressable_devices_indices_map((batch_size,)).values()
        self.local = np.unique(np.concatenate([np.arange(batch_size)[rows] for rows in slices]))

    def put(self, values: np.ndarray) -> jax.Array:
        """Starts copying local rows [n, …] to the devices; returns the global array [B, …]."""
        shape = (self._batch_size, *values.shape[1:])
        return jax.make_array_from_process_local_data(self._sharding, values, shape)
