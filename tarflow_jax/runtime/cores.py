"""Divides work among a CPU's cores by images.

XLA runs small matmuls on one core, and cores that share every operation wait at its end. In training, each core is
therefore a device of the mesh. Elsewhere (`BatchRunner`), each core runs the program on one small batch after another.
Measured in docs/lab/performance.md.
"""

import contextlib
import os

import jax
from joblib import cpu_count as usable_cores  # by the affinity and the CPU limit of its container

CPU_ROWS = 8  # a core's smallest share of a training batch
CPU_BATCH = 25  # a core's batch elsewhere: its activations fit into the caches


def use_cores_as_devices(batch_size: int) -> None:
    """Makes cores CPU devices: as many as divide the (micro)batch and leave each at least `CPU_ROWS` images.

    Does nothing if XLA_FLAGS or jax_num_cpu_devices sets the number of devices, if several processes share the work, or
    if JAX has initialised its devices; does not affect accelerators.
    """
    is_set = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if is_set or jax.config.jax_num_cpu_devices != -1 or jax.distributed.is_initialized():  # type: ignore[attr-defined]
        return
    most = max(min(usable_cores(), batch_size // CPU_ROWS), 1)
    with contextlib.suppress(RuntimeError):  # the devices are initialised already
        jax.config.update("jax_num_cpu_devices", max(n for n in range(1, most + 1) if batch_size % n == 0))
