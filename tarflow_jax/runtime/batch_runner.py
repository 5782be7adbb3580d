"""Runs a compiled function on any number of images: batch by batch, on every device, on every core."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, SingleDeviceSharding
from tqdm import tqdm

from tarflow_jax.flow import TarFlowConfig
from tarflow_jax.runtime.compilation import use_mesh
from tarflow_jax.runtime.cores import CPU_BATCH, usable_cores
from tarflow_jax.runtime.mesh import Rows, batch_sharding
from tarflow_jax.runtime.preemption import stop_if_requested
from tarflow_jax.runtime.sharding import shardings

DEFAULT_MEMORY_BOUND = 2 * 2**30
_PROGRESS_DELAY_S = 3  # shorter work shows no bar

_compiled: set[Any] = set()  # programs that this process has compiled


@dataclasses.dataclass(frozen=True)
class LazyRows:
    """Rows that are read when their batch is run.

    Attributes:
      read: maps ascending indices, int [n], to arrays [n, …] by name.
      total: the number of rows, B.
    """

    read: Callable[[np.ndarray], Any]
    total: int


class BatchRunner:
    """Runs compiled functions on images, in equal batches that fit into memory; the last one is padded.

    Attributes:
      on_cores: whether the device is a single CPU; each of its cores then runs batches of its own.
    """

    def __init__(self, mesh: Mesh | None, memory_bound: int = DEFAULT_MEMORY_BOUND) -> None:
        """Takes a mesh, or None for the default device, and a limit on the bytes of activations alive at one time."""
        self.mesh, self.memory_bound = mesh, memory_bound
        device = jax.local_devices()[0] if mesh is None else mesh.devices.flat[0]
        self._on_cpu = device.platform == "cpu"
        self.on_cores = self._on_cpu and (mesh is None or mesh.size == 1)
        self._sharding = SingleDeviceSharding(device) if mesh is None else batch_sharding(mesh)
        self._many_processes = mesh is not None and mesh.is_multi_process
        self._shards = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]

    def place(self, variables: Any) -> Any:
        """Places variables on the devices, sharded over the mesh; does not move arrays that are already there."""
        if self.mesh is None:
            return jax.device_put(variables, self._sharding)
        layout = shardings(self.mesh, variables)
        if not self._many_processes:
            return jax.device_put(variables, layout)

        def put(x: Any, sharding: jax.sharding.Sharding) -> jax.Array:
            if isinstance(x, jax.Array) and x.sharding == sharding:  # such as a training state's
                return x
            # Via the host: JAX cannot move an array from one process's devices to those of all processes.
            return jax.device_put(jax.device_get(x), sharding)

        return jax.tree.map(put, variables, layout)

    def run(
        self,
        function: "functools.partial[Any]",
        variables: Any,
        rows: Mapping[str, Any] | LazyRows,
        *,
        bytes_per_image: int,
        smallest: int = 1,
        description: str | None = None,
        **shared: Any,
    ) -> Any:
        """Returns function(variables, **rows, **shared), computed batch by batch.

        If the mesh spans processes, all must call this with the same arguments, and each gets all results.

        Args:
          function: a jitted function with its static arguments; every output has a leading batch axis.
          variables: as in `place`.
          rows: arrays [B, …] by argument name; None stays None.
          bytes_per_image: bytes of activations per image.
          smallest: the smallest batch size; fewer images are padded.
          description: shown by the progress bar; None for no bar.
          shared: arguments that are the same for every batch.

        Returns:
          A pytree of NumPy arrays [B, …].

        Raises:
          Preempted: see `PreemptionGuard`.
        """
        lazy = rows if isinstance(rows, LazyRows) else self._in_memory(rows)
        total = lazy.total
        size, workers = self._batch_size(total, bytes_per_image, smallest)

        def run_batch(start: int) -> Any:
            stop_if_requested()
            batch = self._place_rows(lazy, start, size)
            # By default, TPUs and recent GPUs multiply float32 with fewer bits.
            with use_mesh(self.mesh), jax.default_matmul_precision("highest"):
                result = function(variables, **batch, **shared)
            if self._many_processes:
                return multihost_utils.process_allgather(result, tiled=True)
            return jax.tree.map(np.asarray, result)  # blocks until it is computed

        static = (function.func, function.args, *function.keywords.items())
        key = (static, self.mesh, size, jax.tree.structure(shared))
        results = []
        bar = progress(None, description, total=total, unit=" images")
        with ThreadPoolExecutor(workers) as threads, bar:
            for result in _first_alone(run_batch, range(0, total, size), threads, key):
                results.append(result)
                bar.update(min(size, total - bar.n))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:total], *results)

    def _batch_size(self, total: int, bytes_per_image: int, smallest: int) -> tuple[int, int]:
        """Returns (batch size, concurrent batches) that respect the memory bound, down to one image."""
        affordable = max(self.memory_bound // bytes_per_image, 1)
        if not self.on_cores:
            share = min(affordable // self._shards, -(-total // self._shards))
            share = min(share, CPU_BATCH) if self._on_cpu else share
            return max(share, smallest) * self._shards, 1
        cores = usable_cores()
        size = max(min(affordable // cores, CPU_BATCH, -(-total // cores)), smallest)
        return size, max(min(cores, affordable // size), 1)

    def _in_memory(self, rows: Mapping[str, Any]) -> LazyRows:
        rows = dict(rows)
        total = len(jax.tree.leaves(rows)[0])
        if self._many_processes:
            host = jax.tree.map(np.asarray, rows)
            return LazyRows(lambda index: jax.tree.map(lambda x: x[index], host), total)
        return LazyRows(lambda index: jax.tree.map(lambda x: x[index[0] : index[-1] + 1], rows), total)

    def _place_rows(self, rows: LazyRows, start: int, size: int) -> Any:
        """Places rows start … start + size - 1 on the devices, with zeros beyond the last one."""
        local, put = np.arange(size), lambda x: jax.device_put(x, self._sharding)
        if self._many_processes and self.mesh is not None:
            mine = Rows(self.mesh, size)
            local, put = mine.local, mine.put
        index = start + local
        values = rows.read(index[index < rows.total])

        def padded(x: Any) -> jax.Array:
            missing = len(local) - len(x)
            if missing:
                pad = np.pad if isinstance(x, np.ndarray) else jnp.pad
                x = pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
            return put(x)

        return jax.tree.map(padded, values)


def _first_alone(
    run_batch: Callable[[int], Any], starts: range, threads: ThreadPoolExecutor, key: Any
) -> Iterator[Any]:
    """Yields results in order; the first batch of a new program runs alone, so that only one thread compiles it."""
    if key not in _compiled:
        yield run_batch(starts[0])
        _compiled.add(key)
        starts = starts[1:]
    yield from threads.map(run_batch, starts)


def forward_bytes(config: TarFlowConfig) -> int:
    """Estimates a layer's activation bytes per image: residual stream, qkv, hidden layer and attention logits."""
    slots = config.condition_length + config.num_tokens
    return 4 * slots * (16 * config.width + 2 * config.num_heads * slots)


def backward_bytes(config: TarFlowConfig) -> int:
    """Estimates the activation bytes per image kept for the gradient; with remat, one residual stream per layer."""
    if config.remat == "full":
        slots = config.condition_length + config.num_tokens
        return forward_bytes(config) + 4 * sum(config.depths) * slots * config.width
    return sum(config.depths) * forward_bytes(config)


def progress(items: Iterable[Any] | None, description: str | None, **options: Any) -> tqdm:
    """Returns a progress bar with the remaining time, shown only on a terminal and removed when the work is done.

    Args:
      items: to iterate over; None for a bar that is advanced by `update`.
      description: of the work; None for no bar.
      options: options of tqdm, such as total and unit.
    """
    disable = True if description is None else None  # None disables it without a terminal
    return tqdm(items, description, disable=disable, leave=False, delay=_PROGRESS_DELAY_S, **options)
