"""Many devices: the mesh, and what is sharded over which of its axes."""

from tarflow_jax.distributed.mesh import BATCH_AXES, batch_sharding, make_mesh, replicated
from tarflow_jax.distributed.sharding import leaf_name, shardings, summary

__all__ = [
    "BATCH_AXES",
    "batch_sharding",
    "leaf_name",
    "make_mesh",
    "replicated",
    "shardings",
    "summary",
]
