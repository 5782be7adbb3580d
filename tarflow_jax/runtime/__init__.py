"""What programs run on: processes, devices and meshes, compiled programs, batches of any size."""

from tarflow_jax.runtime.batches import BatchRunner, LazyRows
from tarflow_jax.runtime.cores import use_cores_as_devices
from tarflow_jax.runtime.environment import environment, release
from tarflow_jax.runtime.mesh import BATCH_AXES, batch_sharding, make_mesh, replicated
from tarflow_jax.runtime.preemption import Preempted, PreemptionGuard, stop_if_requested
from tarflow_jax.runtime.processes import start_processes
from tarflow_jax.runtime.programs import Program
from tarflow_jax.runtime.progress import progress
from tarflow_jax.runtime.rows import Rows
from tarflow_jax.runtime.sharding import for_products, gathered, leaf_name, shardings, summary

__all__ = [
    "BATCH_AXES",
    "BatchRunner",
    "LazyRows",
    "Preempted",
    "PreemptionGuard",
    "Program",
    "Rows",
    "batch_sharding",
    "environment",
    "for_products",
    "gathered",
    "leaf_name",
    "make_mesh",
    "progress",
    "release",
    "replicated",
    "shardings",
    "start_processes",
    "stop_if_requested",
    "summary",
    "use_cores_as_devices",
]
