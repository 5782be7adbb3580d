"""Shards every leaf of a state by its name; `parameters.PARAMETERS` has the mesh axis of each dimension.

Paths of optimizer moments and averages end in their parameters' names, so they are sharded like the parameters.
"""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tarflow_jax.errors import UserError
from tarflow_jax.runtime.mesh import many_devices
from tarflow_jax.runtime.parameters import row_of

REPLICATED = ("step", "count")  # leaves of the state and of its optimizer that belong to no parameter


def shardings(mesh: Mesh, tree: Any) -> Any:
    """Returns the sharding of every leaf (array or shape) of a state or of variables, by its name.

    Raises UserError if a leaf matches no row of the table, or a mesh axis does not divide its dimension.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, _spec(mesh, leaf_name(path), leaf.shape)), tree
    )


def gathered(block_params: Any) -> Any:
    """All-gathers a block's parameters over `fsdp`; without a mesh, returns them unchanged.

    Call it before a loop that uses them, because XLA would gather them in every iteration.
    """

    def gather(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        spec = P(*(axis if axis != "fsdp" else None for axis in row_of(leaf_name(path)).spec))
        return jax.lax.with_sharding_constraint(leaf, spec)

    return jax.tree_util.tree_map_with_path(gather, block_params) if many_devices() else block_params


def _spec(mesh: Mesh, name: str, shape: tuple[int, ...]) -> P:
    spec = P() if name.rpartition("/")[2] in REPLICATED else row_of(name).spec
    for size, axis in zip(shape, spec, strict=False):
        if axis is not None and size % mesh.shape[axis]:
            raise UserError(
                f"{name} {shape} cannot be sharded {mesh.shape[axis]} ways along its dimension of {size}; "
                f"choose a mesh.{axis} that divides it"
            )
    return spec


def leaf_name(path: tuple[Any, ...]) -> str:
    """Returns a leaf's path in its tree, such as "variables/params/block_0/…"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
