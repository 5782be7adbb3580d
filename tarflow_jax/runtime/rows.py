"""The rows of a global batch that one process reads, and the global array they become."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tarflow_jax.runtime.mesh import batch_sharding


class Rows:
    """The part of a batch that is placed on this process's devices, wherever in the mesh they are.

    Attributes:
      local: int64 [n], these rows' numbers in the global batch, ascending. Processes that share out heads alone
        (`tensor`) have the same rows.
    """

    def __init__(self, mesh: Mesh, batch_size: int) -> None:
        """batch_size: the global one; it divides by data x fsdp."""
        self._sharding, self._batch_size = batch_sharding(mesh), batch_size
        slices = self._sharding.addressable_devices_indices_map((batch_size,)).values()
        self.local = np.unique(np.concatenate([np.arange(batch_size)[rows] for rows in slices]))

    def put(self, values: np.ndarray) -> jax.Array:
        """[n, …], of the local rows -> the global array [B, …]; starts a copy and returns."""

        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(self._batch_size)
            first = np.searchsorted(self.local, start)
            return values[first : first + stop - start]

        return jax.make_array_from_callback((self._batch_size, *values.shape[1:]), self._sharding, part)
