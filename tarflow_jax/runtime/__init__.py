"""Where and how programs run: processes, devices, meshes, kernels, compilation and batching."""

from tarflow_jax.runtime.batch_runner import BatchRunner, LazyBatch, progress
from tarflow_jax.runtime.compilation import use_compilation_cache, use_mesh
from tarflow_jax.runtime.cores import use_cores_as_devices
from tarflow_jax.runtime.environment import environment
from tarflow_jax.runtime.kernels import device_flow, in_float32, training_kernels
from tarflow_jax.runtime.mesh import LocalBatch, batch_sharding, make_mesh, replicated
from tarflow_jax.runtime.preemption import Preempted, PreemptionGuard
from tarflow_jax.runtime.processes import start_processes
from tarflow_jax.runtime.sharding import leaf_name, shardings

__all__ = [
    "BatchRunner",
    "LazyBatch",
    "LocalBatch",
    "Preempted",
    "PreemptionGuard",
    "batch_sharding",
    "device_flow",
    "environment",
    "in_float32",
    "leaf_name",
    "make_mesh",
    "progress",
    "replicated",
    "shardings",
    "start_processes",
    "training_kernels",
    "use_compilation_cache",
    "use_cores_as_devices",
    "use_mesh",
]
