"""Runs a compiled function on any number of images: batch by batch, on every device, on every core."""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, SingleDeviceSharding
from tqdm import tqdm

from tarflow_jax.flow import TarFlow, TarFlowConfig
from tarflow_jax.runtime.compilation import use_mesh
from tarflow_jax.runtime.cores import CPU_BATCH, usable_cores
from tarflow_jax.runtime.kernels import device_flow
from tarflow_jax.runtime.mesh import LocalBatch, batch_sharding, default_device
from tarflow_jax.runtime.preemption import stop_if_requested
from tarflow_jax.runtime.sharding import shardings

CPU_MEMORY_BOUND = 2 * 2**30
_PROGRESS_DELAY_S = 3  # shorter work shows no bar

_compiled: set[Any] = set()  # programs that this process has compiled
logger = logging.getLogger("tarflow_jax.pipeline")


@dataclasses.dataclass(frozen=True)
class LazyBatch:
    """Rows that are read when their batch is run.

    Attributes:
      read: maps ascending indices, int [n], to arrays [n, …] by name.
      total: the number of rows, B.
    """

    read: Callable[[np.ndarray], Any]
    total: int


@dataclasses.dataclass(frozen=True)
class BatchRunner:
    """Runs compiled functions on images, in equal batches that fit into memory; the last one is padded.

    Attributes:
      mesh: the devices; None for the one that the variables are on.
      memory_bound: bytes of activations alive at one time, on all devices together. None is half of what an
        accelerator has beside the variables, and 2 GiB for the CPUs of a machine.
    """

    mesh: Mesh | None = None
    memory_bound: int | None = None

    def place(self, variables: Any) -> Any:
        """Places variables on the mesh, sharded, or on JAX's default device; leaves arrays that are already there."""
        if self.mesh is None:
            return jax.device_put(variables, default_device())
        layout = shardings(self.mesh, variables)
        if not self.mesh.is_multi_process:
            return jax.device_put(variables, layout)

        def put(x: Any, sharding: jax.sharding.Sharding) -> jax.Array:
            if isinstance(x, jax.Array) and x.sharding == sharding:  # such as a training state's
                return x
            # Via the host: JAX cannot move an array from one process's devices to those of all processes.
            return jax.device_put(jax.device_get(x), sharding)

        return jax.tree.map(put, variables, layout)

    def bound(self, variables: Any) -> int:
        """Returns the bytes that activations may take beside these variables, on all devices together."""
        if self.memory_bound:
            return self.memory_bound
        device = self.device(variables)
        limit = (device.memory_stats() or {}).get("bytes_limit")
        if device.platform == "cpu" or limit is None:
            return CPU_MEMORY_BOUND
        used = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(variables))
        return self._shards * max((limit - used) // 2, 1)

    def on_cores(self, variables: Any) -> bool:
        """Whether the device is a single CPU; each of its cores then runs batches of its own."""
        return self.device(variables).platform == "cpu" and (self.mesh is None or self.mesh.size == 1)

    def run(
        self,
        function: "functools.partial[Any]",
        variables: Any,
        rows: Mapping[str, Any] | LazyBatch,
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
          rows: trees of arrays [B, …] by argument name; None stays None.
          bytes_per_image: bytes of activations per image.
          smallest: the smallest batch of a CPU's core; fewer images are padded.
          description: shown by the progress bar; None for no bar.
          shared: arguments that are the same for every batch.

        Returns:
          A pytree of NumPy arrays [B, …].

        Raises:
          Preempted: see `PreemptionGuard`.
        """
        lazy = rows if isinstance(rows, LazyBatch) else self._in_memory(rows)
        total, device = lazy.total, self.device(variables)
        size, workers = self._batch_size(variables, total, bytes_per_image, smallest)
        sharding = SingleDeviceSharding(device) if self.mesh is None else batch_sharding(self.mesh)

        def run_batch(start: int) -> Any:
            stop_if_requested()
            on_device = jax.default_device(device) if self.mesh is None else contextlib.nullcontext()
            batch = self._place_rows(lazy, start, size, sharding)
            # By default, TPUs and recent GPUs multiply float32 with fewer bits.
            with use_mesh(self.mesh), on_device, jax.default_matmul_precision("highest"):
                result = function(variables, **batch, **shared)
            if self._many_processes:
                return multihost_utils.process_allgather(result, tiled=True)
            return jax.tree.map(np.asarray, result)  # blocks until it is computed

        starts, results = range(0, total, size), []
        static = (function.func, function.args, *function.keywords.items())
        key = (static, self.mesh, device, size, jax.tree.structure(shared))
        bar = progress(None, description, total=total, unit=" images")
        with contextlib.ExitStack() as stack:
            stack.enter_context(bar)
            # In this thread if there is nothing to do at the same time: JAX's context managers hold in one thread.
            if workers == 1 or len(starts) == 1 or jax.config.jax_disable_jit:  # type: ignore[attr-defined]
                batches: Iterable[Any] = map(run_batch, starts)
            else:
                batches = _first_alone(run_batch, starts, stack.enter_context(ThreadPoolExecutor(workers)), key)
            for result in batches:
                results.append(result)
                bar.update(min(size, total - bar.n))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:total], *results)

    def call(
        self,
        function: Callable[..., Any],
        config: TarFlowConfig,
        variables: Any,
        rows: Mapping[str, Any],
        *,
        bytes_per_image: int = 0,
        smallest: int = 1,
        **shared: Any,
    ) -> Any:
        """Calls a pure function of a flow: by `run`, or at once and differentiable in every mode if anything is traced.

        Args:
          function: called with (flow, variables, **rows, **shared).
          config: of the flow.
          variables: as in `run`; cast to float32.
          rows: as in `run`.
          bytes_per_image: as in `run`; 0 is those of a forward pass.
          smallest: as in `run`.
          shared: as in `run`.

        Returns:
          A pytree of JAX arrays [B, …], on the device of the variables. Warns if some are not finite.
        """
        variables = jax.tree.map(lambda x: x if x.dtype == jnp.float32 else x.astype(jnp.float32), variables)
        if is_traced((rows, shared, variables)):
            variables = jax.lax.stop_gradient(variables) | {"params": variables["params"]}
            with jax.default_matmul_precision("highest"):
                return function(TarFlow(config), variables, **rows, **shared)
        name = getattr(function, "func", function).__name__
        results = self.run(
            functools.partial(function, device_flow(config)),
            variables,
            rows,
            bytes_per_image=bytes_per_image or forward_bytes(config),
            smallest=smallest,
            description=name,
            **shared,
        )
        first = jax.tree.leaves(results)[0]
        if bad := int((~np.isfinite(first).reshape(len(first), -1).all(1)).sum()):
            reason = "the images or the weights are not, or guidance is too strong"
            logger.warning("%s: %d of %d results are not finite; %s", name, bad, len(first), reason)
        with jax.default_device(self.device(variables)):
            return jax.tree.map(jnp.asarray, results)

    @property
    def _many_processes(self) -> bool:
        return self.mesh is not None and self.mesh.is_multi_process

    @property
    def _shards(self) -> int:
        return 1 if self.mesh is None else self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def device(self, variables: Any) -> jax.Device:
        """Returns one of the devices that programs with these variables run on."""
        if self.mesh is not None:
            return self.mesh.local_devices[0]
        placed = (leaf for leaf in jax.tree.leaves(variables) if isinstance(leaf, jax.Array))
        return next((min(leaf.devices(), key=lambda device: device.id) for leaf in placed), default_device())

    def _batch_size(self, variables: Any, total: int, bytes_per_image: int, smallest: int) -> tuple[int, int]:
        """Returns (batch size, concurrent batches) that respect the memory bound, down to one image."""
        affordable = max(self.bound(variables) // bytes_per_image, 1)
        if not self.on_cores(variables):
            share = min(affordable // self._shards, -(-total // self._shards))
            share = min(share, CPU_BATCH) if self.device(variables).platform == "cpu" else share
            return max(share, 1) * self._shards, 1
        cores = usable_cores()
        size = max(min(affordable // cores, CPU_BATCH, -(-total // cores)), smallest)
        return size, max(min(cores, affordable // size), 1)

    def _in_memory(self, rows: Mapping[str, Any]) -> LazyBatch:
        rows = dict(rows)
        total = len(jax.tree.leaves(rows)[0])
        if self._many_processes:
            host = jax.tree.map(np.asarray, rows)
            return LazyBatch(lambda index: jax.tree.map(lambda x: x[index], host), total)
        return LazyBatch(lambda index: jax.tree.map(lambda x: x[index[0] : index[-1] + 1], rows), total)

    def _place_rows(self, rows: LazyBatch, start: int, size: int, sharding: Any) -> Any:
        """Places rows start … start + size - 1 on the devices, with zeros beyond the last one."""
        local, put = np.arange(size), lambda x: jax.device_put(x, sharding)
        if self._many_processes and self.mesh is not None:
            mine = LocalBatch(self.mesh, size)
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


def is_traced(tree: Any) -> bool:
    """Whether any array of a pytree is a tracer of `jax.jit`, `jax.grad` or `jax.vmap`, which has no values yet."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


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


def decoding_bytes(config: TarFlowConfig, at_once: bool) -> int:
    """Estimates the activation bytes per image of decoding; `at_once` if decoders update many tokens together."""
    slots = config.condition_length + config.num_tokens
    caches = max(config.depths) * 4 * 4 * slots * config.width  # float32 keys, values and their copies
    return caches + (forward_bytes(config) if at_once else 0)


def gradient_config(config: TarFlowConfig, runner: BatchRunner, variables: Any) -> TarFlowConfig:
    """Returns the config with the remat that suits gradients of log p in the data."""
    if is_traced(variables):
        return config
    # On a CPU, recomputing activations is faster than keeping them.
    keep_all = dataclasses.replace(config, remat="none")
    recompute = runner.on_cores(variables) or backward_bytes(keep_all) > runner.bound(variables) // 8
    return dataclasses.replace(keep_all, remat="full" if recompute else "none")


def progress(items: Iterable[Any] | None, description: str | None, **options: Any) -> tqdm:
    """Returns a progress bar with the remaining time, shown only on a terminal and removed when the work is done.

    Args:
      items: to iterate over; None for a bar that is advanced by `update`.
      description: of the work; None for no bar.
      options: options of tqdm, such as total and unit.
    """
    disable = True if description is None else None  # None disables it without a terminal
    return tqdm(items, description, disable=disable, leave=False, delay=_PROGRESS_DELAY_S, **options)
