"""Shards every leaf of a state by its name; `parameters.PARAMETERS` has the mesh axis of each dimension.

Paths of optimizer moments and averages end in their parameters' names, so they are sharded like the parameters.
"""

import math
import re
from collections import defaultdict
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tarflow_jax.errors import UserError
from tarflow_jax.runtime.mesh import many_devices
from tarflow_jax.runtime.parameters import rows_of

REPLICATED = ("step", "count")  # leaves of the state and of its optimizer that belong to no parameter


def shardings(mesh: Mesh, tree: Any) -> Any:
    """Returns the sharding of every leaf of a state or of variables, by its name.

    Args:
      mesh: from `make_mesh`.
      tree: arrays or shapes (`jax.eval_shape`).

    Raises:
      ValueError: a leaf matches no row of the table or several, or a mesh axis does not divide its dimension.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, _spec(mesh, leaf_name(path), leaf.shape)), tree
    )


def gathered(block_params: Any) -> Any:
    """All-gathers a block's parameters over `fsdp`; without a mesh, returns them unchanged.

    Call it before a loop that uses them, because XLA would gather them in every iteration.
    """

    def whole(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        rows = rows_of(leaf_name(path))
        spec = P(*(axis if axis != "fsdp" else None for row in rows for axis in row.spec))
        return jax.lax.with_sharding_constraint(leaf, spec)

    return jax.tree_util.tree_map_with_path(whole, block_params) if many_devices() else block_params


def summary(mesh: Mesh, tree: Any) -> str:
    """Returns the mesh and, if it shards leaves, a line for each kind: number of leaves, total size and mesh axes."""
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    if mesh.shape["fsdp"] == mesh.shape["tensor"] == 1:
        return f"mesh: {shape}; parameters are replicated"
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = re.sub(r"block_\d+", "block_*", leaf_name(path))
        spec = _spec(mesh, leaf_name(path), leaf.shape)
        axes = ", ".join("·" if axis is None else str(axis) for axis in spec) or "replicated"
        groups[name, axes].append(math.prod(leaf.shape))
    lines = [f"mesh: {shape}"]
    lines += [f"  {name:<48} {len(n):>3} x {sum(n):>12,}  {axes}" for (name, axes), n in groups.items()]
    return "\n".join(lines)


def _spec(mesh: Mesh, name: str, shape: tuple[int, ...]) -> P:
    specs = [row.spec for row in rows_of(name)]
    if name.rpartition("/")[2] in REPLICATED:
        specs.append(P())
    if len(specs) != 1:
        raise UserError(f"{name} {shape} matches {len(specs)} sharding rules; expected exactly one")
    for size, axis in zip(shape, specs[0], strict=False):
        if axis is not None and size % mesh.shape[axis]:
            raise UserError(
                f"{name} {shape} cannot be sharded {mesh.shape[axis]} ways along its dimension of {size}; "
                f"choose a mesh.{axis} that divides it"
            )
    return specs[0]


def leaf_name(path: tuple[Any, ...]) -> str:
    """Returns a leaf's path in its tree, such as "variables/params/block_0/…"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
