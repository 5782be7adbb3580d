"""Saves while the second of two processes may not write; prints what each of them found.

python tests/save_apart.py FOLDER
"""

import os
import resource
import sys
from pathlib import Path

import jax
from jax.sharding import NamedSharding, PartitionSpec

from tarflow_jax.runtime import make_mesh, start_processes
from tarflow_jax.training import Checkpoints


def main(folder):
    """Saves step 1, then step 2, whose files may not grow beyond 4 KiB on the second process."""
    lie = NamedSharding(make_mesh(), PartitionSpec(("data",)))
    state = {"kernel": jax.jit(lambda: jax.random.normal(jax.random.key(0), (1 << 16,)), out_shardings=lie)()}
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save(1, state, {})
    checkpoints.wait()
    if jax.process_index() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    checkpoints.save(2, state, {})
    try:
        checkpoints.wait()
    except OSError as error:
        print(error, flush=True)
    os._exit(0)


if __name__ == "__main__":
    start_processes()
    main(Path(sys.argv[1]))
