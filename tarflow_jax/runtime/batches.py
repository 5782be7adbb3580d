"""Any number of images through a compiled program: a batch at a time, on every device, on every core."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, SingleDeviceSharding

from tarflow_jax.runtime.cores import CPU_BATCH, usable_cores
from tarflow_jax.runtime.mesh import batch_sharding
from tarflow_jax.runtime.preemption import stop_if_requested
from tarflow_jax.runtime.programs import Program
from tarflow_jax.runtime.progress import progress
from tarflow_jax.runtime.rows import Rows
from tarflow_jax.runtime.sharding import shardings

DEFAULT_MEMORY_BOUND = 2 * 2**30

_compiled: set[Any] = set()  # what this process has run before: threads need not wait for its compilation


@dataclasses.dataclass(frozen=True)
class LazyRows:
    """Rows that are read when their turn comes.

    Attributes:
      read: ascending indices, int [n], to a tuple of arrays [n, …].
      total: how many there are, B.
    """

    read: Callable[[np.ndarray], Any]
    total: int


class BatchRunner:
    """Runs compiled functions on images: in equal batches that fit memory, the last one padded.

    Attributes:
      on_cores: the device is one CPU, each of whose cores takes batches of its own.
    """

    def __init__(self, mesh: Mesh | None, memory_bound: int = DEFAULT_MEMORY_BOUND) -> None:
        """mesh: None is the default device. memory_bound: bytes of all activations that exist at one time."""
        self.mesh, self.memory_bound = mesh, memory_bound
        device = jax.local_devices()[0] if mesh is None else mesh.devices.flat[0]
        self._on_cpu = device.platform == "cpu"
        self.on_cores = self._on_cpu and (mesh is None or mesh.size == 1)
        self._sharding = SingleDeviceSharding(device) if mesh is None else batch_sharding(mesh)
        self._many_processes = mesh is not None and mesh.is_multi_process
        self._shards = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]

    def place(self, variables: Any) -> Any:
        """Variables on the devices, sharded over the mesh; arrays that are there already are not moved."""
        if self.mesh is None:
            return jax.device_put(variables, self._sharding)
        layout = shardings(self.mesh, variables)
        if not self._many_processes:
            return jax.device_put(variables, layout)

        def put(x: Any, sharding: jax.sharding.Sharding) -> jax.Array:
            if isinstance(x, jax.Array) and x.sharding == sharding:  # a training state's, say
                return x
            # From the host: JAX moves no array from one process's devices to all processes'.
            return jax.device_put(jax.device_get(x), sharding)

        return jax.tree.map(put, variables, layout)

    def run(
        self,
        program: functools.partial[Any],
        variables: Any,
        rows: "tuple[Any, ...] | LazyRows",
        *args: Any,
        bytes_per_image: int,
        smallest: int = 1,
        description: str | None = None,
    ) -> Any:
        """program(variables, *rows, *args), some images at a time.

        Where the mesh spans processes, all call this with the same arguments, and each gets all results.

        Args:
          program: a jitted function and its static arguments; all that it returns has the batch first.
          rows: arrays [B, …]; None stays None.
          args: what every batch gets whole.
          bytes_per_image: of its activations.
          smallest: images of the smallest batch; fewer are padded.
          description: what the progress bar calls this; None for no bar.

        Returns:
          A pytree of NumPy arrays [B, …].

        Raises:
          Preempted: see `PreemptionGuard`.
        """
        if not isinstance(rows, LazyRows):
            rows = self._in_memory(rows)
        total, read = rows.total, rows.read
        size, workers = self._batch_size(total, bytes_per_image, smallest)
        on_mesh = Program(program, self.mesh)

        def run_from(start: int) -> Any:
            stop_if_requested()
            given = self._place_rows(read, start, size, total)
            result = on_mesh(variables, *given, *args)
            if self._many_processes:
                return multihost_utils.process_allgather(result, tiled=True)
            return jax.tree.map(np.asarray, result)  # waits for it

        key = (program.func, program.args, *program.keywords.items(), self.mesh, size, jax.tree.structure(args))
        results = []
        bar = progress(None, description, total=total, unit=" images")
        with ThreadPoolExecutor(workers) as threads, bar:
            for result in _first_alone(run_from, range(0, total, size), threads, key):
                results.append(result)
                bar.update(min(size, total - bar.n))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:total], *results)

    def _batch_size(self, total: int, bytes_per_image: int, smallest: int) -> tuple[int, int]:
        """(images of a batch, batches at one time); together they keep to the memory bound, down to one image."""
        affordable = max(self.memory_bound // bytes_per_image, 1)
        if not self.on_cores:
            share = min(affordable // self._shards, -(-total // self._shards))
            share = min(share, CPU_BATCH) if self._on_cpu else share
            return max(share, smallest) * self._shards, 1
        cores = usable_cores()
        size = max(min(affordable // cores, CPU_BATCH, -(-total // cores)), smallest)
        return size, max(min(cores, affordable // size), 1)

    def _in_memory(self, rows: tuple[Any, ...]) -> "LazyRows":
        total = len(jax.tree.leaves(rows)[0])
        if self._many_processes:
            host = jax.tree.map(np.asarray, rows)
            return LazyRows(lambda index: jax.tree.map(lambda x: x[index], host), total)
        return LazyRows(lambda index: jax.tree.map(lambda x: x[index[0] : index[-1] + 1], rows), total)

    def _place_rows(self, read: Callable[[np.ndarray], Any], start: int, size: int, total: int) -> Any:
        """Rows start .. start + size - 1 on the devices, zeros beyond the last one."""
        local, put = np.arange(size), lambda x: jax.device_put(x, self._sharding)
        if self._many_processes and self.mesh is not None:
            mine = Rows(self.mesh, size)
            local, put = mine.local, mine.put
        index = start + local
        values = read(index[index < total])

        def padded(x: Any) -> jax.Array:
            missing = len(local) - len(x)
            if missing:
                pad = np.pad if isinstance(x, np.ndarray) else jnp.pad
                x = pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
            return put(x)

        return jax.tree.map(padded, values)


def _first_alone(run_from: Callable[[int], Any], starts: range, threads: ThreadPoolExecutor, key: Any) -> Iterator[Any]:
    """Results in order; the first batch of a new program runs alone, so that threads do not compile it each."""
    if key not in _compiled:
        yield run_from(starts[0])
        _compiled.add(key)
        starts = starts[1:]
    yield from threads.map(run_from, starts)
