"""The mesh that programs run on, and the compilation cache."""

import contextlib
import hashlib
import platform
from collections.abc import Iterator
from pathlib import Path

import flax.linen as nn
import jax
from jax.sharding import Mesh

from tarflow_jax.runtime.mesh import RULES


@contextlib.contextmanager
def use_mesh(mesh: Mesh | None) -> Iterator[None]:
    """Sets a mesh from `make_mesh` and its sharding rules for traces and calls; None is the default device."""
    if mesh is None:
        yield
    else:
        with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
            yield


def use_compilation_cache(folder: Path) -> None:
    """Caches compiled programs in a folder that processes may share; above 4 GiB, evicts the least recently used ones.

    Each kind of processor has its own subfolder, because a CPU program may use instructions that other CPUs lack.
    """
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    kind = hashlib.sha256(f"{platform.machine()} {features}".encode()).hexdigest()[:16]
    jax.config.update("jax_compilation_cache_dir", str(folder / kind))
    jax.config.update("jax_compilation_cache_max_size", 4 << 30)  # with a limit, JAX locks the folder as it writes
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
