"""Restores while reading fails on one of two processes; prints what each of them found.

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


@contextlib.contextmanager
def trouble(change):
    """Passes what Orbax restores of step 3 through a function."""
    original = ocp.PyTreeCheckpointHandler.restore

    def restore(self, directory, *args, **kwargs):
        state = original(self, directory, *args, **kwargs)
        return change(state) if directory.parent.name == "3" else state

    with mock.patch.object(ocp.PyTreeCheckpointHandler, "restore", restore):
        yield


def failing_on(process, error):
    """Step 3 cannot be restored on one process."""

    def change(state):
        if jax.process_index() == process:
            raise error
        return state

    return trouble(change)


def attempt(name, checkpoints, shapes, context):
    """Prints what a restore returns or raises, then runs a collective, which hangs if the processes disagree."""
    with context:
        try:
            step, state = checkpoints.restore(shapes)
            total = jax.jit(jnp.sum)(state["kernel"])
            print(name, repr(step), int(total))
        except Exception as raised:
            print(name, type(raised).__name__, isinstance(raised, OSError), raised)
    multihost_utils.sync_global_devices(name)


def main(folder):
    """Saves steps 1 to 3, restores them with several kinds of failures, and sets the last aside."""
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
        attempt(f"damaged{process}", checkpoints, shapes, failing_on(process, DATA_LOSS))
        attempt(f"memory{process}", checkpoints, shapes, failing_on(process, MemoryError("no bytes left")))
        denied = PermissionError(13, "Permission denied")
        attempt(f"denied{process}", checkpoints, shapes, failing_on(process, denied))
    attempt("changed", checkpoints, shapes, trouble(lambda state: jax.tree.map(lambda x: x + 1, state)))
    print("best", repr(checkpoints.restore(shapes, best=True)[0]))
    checkpoints.set_aside_after(2)
    attempt("aside", checkpoints, shapes, failing_on(1, DATA_LOSS))
    checkpoints.close()


if __name__ == "__main__":
    start_processes()
    main(sys.argv[1])
