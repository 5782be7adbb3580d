"""A batch of any size through a compiled function: in parts that fit memory, on every device, on every core."""

import contextlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, SingleDeviceSharding

from tarflow_jax.runtime.mesh import batch_sharding
from tarflow_jax.runtime.preemption import stop_if_requested
from tarflow_jax.runtime.sharding import shardings

# Most images of a part on a CPU. XLA gives a product of few rows to one core, so the others take parts of their own,
# and a part's activations stay in its caches (docs/performance.md).
CPU_PART = 25


class Parts:
    """Where a model lies and how a batch is cut.

    Attributes:
      on_cores: the device is one CPU, whose cores each take parts of their own.
    """

    def __init__(self, mesh: Mesh | None, memory_bound: int) -> None:
        """mesh: None is the default device. memory_bound: bytes of activations, on all devices together."""
        self._mesh, self._memory_bound = mesh, memory_bound
        device = jax.local_devices()[0] if mesh is None else mesh.devices.flat[0]
        self.on_cores = device.platform == "cpu" and (mesh is None or mesh.size == 1)
        self._rows = SingleDeviceSharding(device) if mesh is None else batch_sharding(mesh)
        self._many_processes = mesh is not None and mesh.is_multi_process
        self._shards = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
        self._compiled: set[Any] = set()

    def place(self, variables: Any) -> Any:
        """Variables on the devices."""
        return jax.device_put(variables, self._rows if self._mesh is None else shardings(self._mesh, variables))

    def _in_force(self) -> contextlib.AbstractContextManager[Any]:
        """Makes the mesh known to attention kernels that XLA cannot partition."""
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def run(
        self,
        function: Callable[..., Any],
        variables: Any,
        images: jax.Array,
        labels: jax.Array | None,
        *args: Any,
        bytes_per_image: int,
        smallest: int = 1,
        **static: Any,
    ) -> Any:
        """function(variables, images, labels, *args, **static), some images at a time.

        Where the mesh spans processes, all call this with the same arguments, and each gets the whole result.

        Args:
          function: jit-compiled; what it returns has the batch first.
          images: [B, …]. labels: [B].
          bytes_per_image: of its activations.
          smallest: images of the smallest part; a smaller batch is padded.
        """
        total = len(images)
        bound = max(self._memory_bound // bytes_per_image // self._shards, 1)
        cores = os.cpu_count() or 1
        if self.on_cores:
            bound = min(bound, CPU_PART, -(-total // cores))
        size = max(min(bound, -(-total // self._shards)), smallest) * self._shards

        def part(start: int) -> Any:
            stop_if_requested()

            def rows(x: jax.Array) -> jax.Array:
                x = x[start : start + size]
                x = jnp.pad(x, [(0, size - len(x))] + [(0, 0)] * (x.ndim - 1))
                if self._many_processes:
                    return jax.make_array_from_callback(x.shape, self._rows, np.asarray(x).__getitem__)
                return jax.device_put(x, self._rows)

            given = None if labels is None else rows(labels)
            with self._in_force():
                result = jax.block_until_ready(function(variables, rows(images), given, *args, **static))
            return multihost_utils.process_allgather(result, tiled=True) if self._many_processes else result

        starts, parts = list(range(0, total, size)), []
        program = (function, size, labels is None, *(x is None for x in args), *static.items())
        if program not in self._compiled:
            parts.append(part(starts.pop(0)))  # so that threads do not compile it each
            self._compiled.add(program)
        with ThreadPoolExecutor(cores if self.on_cores else 1) as threads:
            parts += threads.map(part, starts)
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[:total], *parts)
