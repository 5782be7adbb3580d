"""One mesh with three axes: `data` copies the model, `fsdp` cuts parameters along width, `tensor` cuts heads."""

import math
import os
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tarflow_jax.errors import UserError
from tarflow_jax.flow.attention import BATCH_AXES

AXES = ("data", "fsdp", "tensor")
CPU_ROWS = 8  # a CPU device's least share of a batch


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices; at most one size may be -1, meaning whatever is left.

    TPU slices, joined by the slow network between hosts, share `data` alone.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or `data` not to a number of slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = dict(zip(AXES, (data, fsdp, tensor), strict=True))
    given = math.prod(size for size in sizes.values() if size != -1)
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or given < 1 or len(devices) % given or (not free and given != len(devices)):
        raise UserError(
            f"mesh {', '.join(f'{axis}={size}' for axis, size in sizes.items())} does not cover {len(devices)} "
            "devices; the sizes must multiply to their number, and one may be -1"
        )
    for axis in free:
        sizes[axis] = len(devices) // given
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    if sizes["data"] % slices:
        raise UserError(f"mesh data={sizes['data']} does not divide by the {slices} slices; choose a multiple")
    inside = (sizes["data"] // slices, sizes["fsdp"], sizes["tensor"])
    # An axis of 8 on a torus of 4 x 4 x 4 takes half of a physical axis.
    if slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh(inside, devices, allow_split_physical_axes=True)
    # linen's modules are written for automatic propagation, which is not make_mesh's default.
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def split_cpu(batch_size: int) -> None:
    """Makes each core a CPU device of its own, as many as divide the batch and leave each `CPU_ROWS` rows or more.

    Cores that each run a whole program on their own rows need not wait for one another at every operation: a sixth
    of a training step (docs/performance.md). Does nothing where XLA_FLAGS or jax_num_cpu_devices say how many, and
    nothing to accelerators. To be called before JAX first asks for its devices.
    """
    given = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if given or jax.config.jax_num_cpu_devices != -1:  # type: ignore[attr-defined]
        return
    most = max(min(os.cpu_count() or 1, batch_size // CPU_ROWS), 1)
    jax.config.update("jax_num_cpu_devices", max(n for n in range(1, most + 1) if batch_size % n == 0))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over `data` and `fsdp`; every other dimension whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())
