"""The sharding of a state's leaves, by their names: `parameters.PARAMETERS` says which axis each is sharded over.

Optimizer moments and averages end in their parameters' names, so they are sharded alike.
"""

import math
import re
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tarflow_jax.errors import UserError
from tarflow_jax.flow.attention import many_devices
from tarflow_jax.runtime.parameters import rows_of

REPLICATED = ("step", "count")  # of the state and of its optimizer, beside what is a parameter's


def shardings(mesh: Mesh, tree: Any) -> Any:
    """The sharding of every leaf of a state or of variables, by its name.

    Args:
      mesh: of `make_mesh`.
      tree: arrays or shapes (`jax.eval_shape`).

    Raises:
      ValueError: a leaf matches no row of the table or several, or a mesh axis does not divide its dimension.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, _spec(mesh, leaf_name(path), leaf.shape)), tree
    )


def gathered(block_params: Any) -> Any:
    """A block's parameters, those that the mesh in force shards over `fsdp` gathered; without a mesh, the same.

    For loops that use them often: XLA would gather them inside, with every use.
    """

    def whole(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        rows = rows_of(leaf_name(path))  # none of what is no parameter
        spec = P(*(axis if axis != "fsdp" else None for row in rows for axis in row.spec))
        return jax.lax.with_sharding_constraint(leaf, spec)

    return jax.tree_util.tree_map_with_path(whole, block_params) if many_devices() else block_params


def for_products(tree: Any, dtype: jnp.dtype) -> Any:
    """Parameters, those of dense layers in the dtype that their products are computed in."""

    def cast(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        (row,) = rows_of(leaf_name(path))
        return leaf.astype(dtype) if row.output_axes else leaf

    return jax.tree_util.tree_map_with_path(cast, tree)


def summary(mesh: Mesh, tree: Any) -> str:
    """One line a group of like-named, like-sharded leaves: count, numbers, the mesh axes they are sharded over."""
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = re.sub(r"block_\d+", "block_*", leaf_name(path))
        spec = _spec(mesh, leaf_name(path), leaf.shape)
        axes = ", ".join("·" if axis is None else str(axis) for axis in spec) or "replicated"
        groups[name, axes].append(math.prod(leaf.shape))
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
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
    """A leaf's path in its tree, as "variables/params/block_0/…"."""
    return "/".join(str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key in path)
