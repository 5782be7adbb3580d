"""Many devices: processes, the mesh, what is sharded over which of its axes, how batches are cut to fit."""

from tarflow_jax.distributed.mesh import BATCH_AXES, batch_sharding, make_mesh, replicated, split_cpu
from tarflow_jax.distributed.parts import Parts
from tarflow_jax.distributed.preemption import Preempted, PreemptionGuard, stop_if_requested
from tarflow_jax.distributed.rows import Rows
from tarflow_jax.distributed.sharding import leaf_name, shardings, summary
from tarflow_jax.distributed.start import start_processes

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
