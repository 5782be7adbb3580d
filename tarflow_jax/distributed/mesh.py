"""One mesh with three axes: `data` copies the model, `fsdp` cuts parameters along width, `tensor` cuts heads."""

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh over all devices; at most one size may be -1, meaning whatever is left.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = dict(zip(AXES, (data, fsdp, tensor), strict=True))
    given = math.prod(size for size in sizes.values() if size != -1)
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or given < 1 or len(devices) % given or (not free and given != len(devices)):
        raise ValueError(
            f"mesh {', '.join(f'{axis}={size}' for axis, size in sizes.items())} does not cover {len(devices)} "
            "devices; the sizes must multiply to their number, and one may be -1"
        )
    for axis in free:
        sizes[axis] = len(devices) // given
    # linen's modules are written for automatic propagation, which is not make_mesh's default.
    return jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over `data` and `fsdp`; every other dimension whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())
