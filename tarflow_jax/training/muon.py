"""Muon for the hidden matrices of all blocks; the devices share the layers."""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from tarflow_jax.runtime import leaf_name
from tarflow_jax.runtime.parameters import Parameter, rows_of

MOMENTUM = 0.95
RMS = 0.2  # of an update, about AdamW's, so that learning rates and weight decay carry over (Liu et al. 2025)
_NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5  # optax scans over a row a step, but unrolls steps of a single row


def muon(learning_rate: optax.Schedule, weight_decay: float, dtype: DTypeLike) -> optax.GradientTransformation:
    """Returns Muon (Jordan et al. 2024) with decoupled weight decay, for trees of `is_hidden_matrix` leaves only.

    Unlike `optax.contrib.muon`, it does not correct the bias of its momentum. Devices send each other directions in
    `dtype`, that of the network's matmuls.
    """
    return optax.chain(
        optax.trace(MOMENTUM, nesterov=True),
        optax.stateless(lambda momentum, _: orthogonalized(momentum, dtype)),
        optax.scale(RMS),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def is_hidden_matrix(path: tuple[Any, ...]) -> bool:
    """Whether the parameter at `path` is the kernel of a dense layer inside the transformer layers."""
    row = _row(path)
    return row.stacked and bool(row.input_axes)


def orthogonalized(blocks: dict[str, Any], dtype: DTypeLike) -> dict[str, Any]:
    """Orthogonalizes every matrix and scales it to a root mean square of about 1.

    Args:
      blocks: the same tree of kernels [layers, …] for each block, sharded as the parameters are.

    Returns:
      The same trees with the same shardings, rounded to `dtype`, in float32.
    """

    def of_all_blocks(path: tuple[Any, ...], *kernels: jax.Array) -> list[jax.Array]:
        ends = list(itertools.accumulate(map(len, kernels)))
        return jnp.split(_orthogonalized(_row(path), jnp.concatenate(kernels), dtype), ends[:-1])

    first, *others = blocks.values()
    directions = jax.tree_util.tree_map_with_path(of_all_blocks, first, *others)
    return dict(zip(blocks, jax.tree.transpose(jax.tree.structure(first), None, directions), strict=True))


def _orthogonalized(row: Parameter, stack: jax.Array, dtype: DTypeLike) -> jax.Array:
    """`orthogonalized` for one stack of kernels; each device computes its share of the layers."""
    mesh, layouts = jax.sharding.get_abstract_mesh(), []
    # From the parameters' sharding to layers over all devices, one mesh axis at a time. XLA compiles such a change to
    # a slice or an all-to-all; to move all axes at once, or a concatenation, it would send whole stacks.
    for count in range(0 if mesh.empty else len(mesh.axis_names) + 1):
        moved = mesh.axis_names[:count]
        layouts.append(PartitionSpec(moved, *(None if axis in moved else axis for axis in row.spec[1:])))

    padding = [(0, -len(stack) % max(mesh.size, 1)), *[(0, 0)] * (stack.ndim - 1)]
    shared = functools.reduce(jax.lax.with_sharding_constraint, layouts, jnp.pad(stack, padding))
    matrices = optax.contrib.MuonDimensionNumbers(row.input_axes, row.output_axes)
    # optax does not export its Newton-Schulz iteration. Without momentum, its Muon is just that.
    newton_schulz = optax.contrib.scale_by_muon(
        _NEWTON_SCHULZ, beta=0.0, nesterov=False, weight_dimension_numbers=matrices
    )
    directions, _ = newton_schulz.update(shared, newton_schulz.init(shared))
    longer_side = max(math.prod(stack.shape[i] for i in axes) for axes in (row.input_axes, row.output_axes))
    directions = (math.sqrt(longer_side) * directions).astype(dtype)
    directions = functools.reduce(jax.lax.with_sharding_constraint, reversed(layouts), directions)
    return directions[: len(stack)].astype(jnp.float32)


def _row(path: tuple[Any, ...]) -> Parameter:
    (row,) = rows_of(leaf_name(path))
    return row
