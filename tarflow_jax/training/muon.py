"""Muon for the hidden matrices of all blocks; the devices share the layers."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
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
_COEFFICIENTS = ((3.4445, -4.7750, 2.0315),) * 5  # optax scans over a row a step, but unrolls steps of a single row


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
        row, ends = _row(path), list(itertools.accumulate(map(len, kernels)))
        sides = optax.contrib.MuonDimensionNumbers(row.input_axes, row.output_axes)
        function = functools.partial(_newton_schulz, sides, dtype)
        axes = jax.sharding.get_abstract_mesh().axis_names
        return jnp.split(_over_devices(axes, function, jnp.concatenate(kernels), row.spec[1:]), ends[:-1])

    first, *others = blocks.values()
    directions = jax.tree_util.tree_map_with_path(of_all_blocks, first, *others)
    directions = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), directions)
    return dict(zip(blocks, jax.tree.transpose(jax.tree.structure(first), None, directions), strict=True))


def _newton_schulz(sides: optax.contrib.MuonDimensionNumbers, dtype: DTypeLike, stack: jax.Array) -> jax.Array:
    """Orthogonalizes and scales a stack [layers, …] of kernels."""
    # optax does not export its Newton-Schulz iteration. Without momentum, its Muon is just that.
    iteration = optax.contrib.scale_by_muon(_COEFFICIENTS, beta=0.0, nesterov=False, weight_dimension_numbers=sides)
    directions, _ = iteration.update(stack, iteration.init(stack))
    longer_side = max(math.prod(stack.shape[axis] for axis in axes) for axes in sides)
    return (math.sqrt(longer_side) * directions).astype(dtype)


def _over_devices(
    axes: Sequence[str], function: Callable[[jax.Array], jax.Array], stack: jax.Array, spec: Sequence[str | None]
) -> jax.Array:
    """Applies `function` to a stack [layers, …], the layers divided among the devices along the mesh's `axes`.

    `spec` shards the other dimensions. XLA compiles each axis to a slice and an all-gather where it is not in `spec`,
    to two all-to-alls where it is. Constrained to all axes at once, it would all-gather whole stacks.
    """
    if not axes:
        return function(stack)
    axis, *others = axes
    size = jax.sharding.get_abstract_mesh().shape[axis]
    without = [None if name == axis else name for name in spec]
    divided, constrain = PartitionSpec(axis, None, *without), jax.lax.with_sharding_constraint

    whole = constrain(stack, PartitionSpec(None, *spec))
    padded = jnp.pad(whole, [(0, -len(stack) % size), *[(0, 0)] * (stack.ndim - 1)])
    shares = constrain(padded.reshape(size, -1, *stack.shape[1:]), divided)
    results = jax.vmap(lambda share: _over_devices(others, function, share, without), spmd_axis_name=axis)(shares)
    gathered = constrain(constrain(results, divided), PartitionSpec(None, None, *spec))
    return gathered.reshape(-1, *stack.shape[1:])[: len(stack)]


def _row(path: tuple[Any, ...]) -> Parameter:
    (row,) = rows_of(leaf_name(path))
    return row
