"""Many devices: processes, the mesh, what is sharded over which of its axes, how batches are cut to fit."""

from tarflow_jax.runtime.mesh import BATCH_AXES, batch_sharding, make_mesh, replicated, split_cpu
from tarflow_jax.runtime.parts import Parts
from tarflow_jax.runtime.preemption import Preempted, PreemptionGuard, stop_if_requested
from tarflow_jax.runtime.processes import start_processes
from tarflow_jax.runtime.rows import Rows
from tarflow_jax.runtime.sharding import leaf_name, shardings, summary

__all__ = [
    "BATCH_AXES",
    "Parts",
    "Preempted",
    "PreemptionGuard",
    "Rows",
    "batch_sharding",
    "leaf_name",
    "make_mesh",
    "replicated",
    "shardings",
    "split_cpu",
    "start_processes",
    "stop_if_requested",
    "summary",
]
