"""Restores while something fails in process 1 alone; to be started as two processes. Prints what each found.

python tests/restore_apart.py FOLDER
"""

import contextlib
import logging
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from tarflow_jax.runtime import make_mesh, start_processes
from tarflow_jax.training import Checkpoints

DATA_LOSS = ValueError("DATA_LOSS: a checksum does not match")


def failing_on(process, error):
    """Within it, step 3 cannot be restored on one process."""
    original = ocp.PyTreeCheckpointHandler.restore

    def restore(self, directory, *args, **kwargs):
        if directory.parent.name == "3":
            raise error
        return original(self, directory, *args, **kwargs)

    if jax.process_index() != process:
        return contextlib.nullcontext()
    return mock.patch.object(ocp.PyTreeCheckpointHandler, "restore", restore)


def attempt(name, checkpoints, shapes, process, error):
    """Prints what a restore gives; then a collective, in which processes that went apart would hang."""
    with failing_on(process, error):
        try:
            step, state = checkpoints.restore(shapes)
            total = jax.jit(jnp.sum)(state["kernel"])
            print(name, repr(step), int(total))
        except Exception as raised:
            print(name, type(raised).__name__, isinstance(raised, OSError), raised)
    multihost_utils.sync_global_devices(name)


def main(folder):
    """Saves steps 1 to 3, restores them in trouble of several kinds, and sets the last aside."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stdout, format="%(message)s", force=True)
    logging.getLogger("absl").setLevel(logging.ERROR)
    lie = NamedSharding(make_mesh(), PartitionSpec(("data",)))
    checkpoints = Checkpoints(Path(folder) / "checkpoints")
    for step in (1, 2, 3):
        state = {"kernel": jax.jit(lambda step: jnp.full(8, step), out_shardings=lie)(jnp.int32(step))}
        checkpoints.save(step, state, {}, float(step))
    checkpoints.close()
    checkpoints = Checkpoints(Path(folder) / "checkpoints")
    shapes = {"kernel": jax.ShapeDtypeStruct((8,), jnp.int32, sharding=lie)}
    for process in (0, 1):
        attempt(f"damaged{process}", checkpoints, shapes, process, DATA_LOSS)
        attempt(f"memory{process}", checkpoints, shapes, process, MemoryError("no bytes left"))
        attempt(f"denied{process}", checkpoints, shapes, process, PermissionError(13, "Permission denied"))
    print("best", repr(checkpoints.restore(shapes, best=True)[0]))
    checkpoints.set_aside_after(2)
    attempt("aside", checkpoints, shapes, 1, DATA_LOSS)
    checkpoints.close()


if __name__ == "__main__":
    start_processes()
    main(sys.argv[1])
