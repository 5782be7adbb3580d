"""Compiled programs, the mesh they run on, and the folder they are kept in."""

import contextlib
import dataclasses
import hashlib
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from tarflow_jax.runtime.mesh import RULES


@contextlib.contextmanager
def use_mesh(mesh: Mesh | None) -> Iterator[None]:
    """Within it, functions are traced and called on a mesh of `make_mesh`, by its sharding rules.

    None is the default device.
    """
    if mesh is None:
        yield
    else:
        with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
            yield


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function on a mesh.

    Attributes:
      function: what `jax.jit` returned. It belongs to the process (a module's function, or one cached by its
        configuration), so that two programs of it compile once.
      mesh: None is the default device.
    """

    function: Any
    mesh: Mesh | None

    def __call__(self, *args: Any, **options: Any) -> Any:
        with use_mesh(self.mesh):
            return self.function(*args, **options)

    def trace(self, *args: Any, **options: Any) -> Any:
        """`jax.jit`'s trace; arguments may be shapes."""
        with use_mesh(self.mesh):
            return self.function.trace(*args, **options)


def use_compilation_cache(folder: Path, max_bytes: int = 4 << 30) -> None:
    """Keeps compiled programs in a folder, which several processes may share; the least used ones are evicted.

    Each kind of processor has a subfolder: a CPU's program holds instructions that another may lack.
    """
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    kind = hashlib.sha256(f"{platform.machine()} {features}".encode()).hexdigest()[:16]
    jax.config.update("jax_compilation_cache_dir", str(folder / kind))
    jax.config.update("jax_compilation_cache_max_size", max_bytes)  # with a limit, JAX locks the folder as it writes
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
