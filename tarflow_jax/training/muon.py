"""Muon for the hidden matrices of all blocks, its orthogonalisation divided among the devices."""

import math
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from tarflow_jax.runtime import leaf_name
from tarflow_jax.runtime.parameters import Parameter, rows_of

BETA = 0.95
_MODEL_AXES = ("fsdp", "tensor")  # of the mesh, over which parameters are sharded
_AXES = (*_MODEL_AXES, "data")
RMS = 0.2  # of an update's numbers: as large as AdamW's, so that rates and weight decay carry over (2502.16982)

_newton_schulz = optax.contrib.scale_by_muon(  # no momentum of its own
    # Given one by one the five steps, all alike, are a loop that is compiled once; optax unrolls a number of steps.
    ns_coeffs=((3.4445, -4.7750, 2.0315),) * 5,
    beta=0.0,
    nesterov=False,
    weight_dimension_numbers=optax.contrib.MuonDimensionNumbers((1,), (2,)),
)


def muon(learning_rate: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
    """Nesterov momentum, orthogonalised (Jordan et al. 2024), for trees of `is_hidden_matrix` leaves alone."""
    return optax.chain(
        optax.trace(BETA, nesterov=True),
        optax.stateless(lambda momentum, _: orthogonalised(momentum)),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def is_hidden_matrix(path: tuple[Any, ...]) -> bool:
    """Whether Muon is for the parameter at `path`: a kernel of a layer, not a bias, a norm, an embedding or a
    projection from or to pixels."""
    (row,) = rows_of(leaf_name(path))
    return row.stacked and bool(row.input_axes)


def orthogonalised(tree: Any) -> Any:
    """Of every matrix of the kernels' stacks, U Vᵀ (about, by Newton-Schulz steps) for its U S Vᵀ, times `RMS` √width.

    Each device of the mesh in force computes its share of the matrices. Where there are more devices than matrices of
    a kind, all kinds are padded to one shape, so that different devices can work on different kinds.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    kinds: dict[Parameter, list[jax.Array]] = defaultdict(list)
    for path, leaf in leaves:
        kinds[rows_of(leaf_name(path))[0]].append(leaf)
    stacks = {row: jnp.concatenate(leaves) for row, leaves in kinds.items()}  # over the layers of all blocks
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.empty else mesh.size
    exchanged = {row: _divided(stack, devices, _MODEL_AXES) for row, stack in stacks.items()}
    matrices = {row: _as_matrices(row, _divided(stack, devices)) for row, stack in exchanged.items()}
    if devices > min(map(len, stacks.values()), default=0):
        matrices = _at_once(matrices, devices)
    else:
        matrices = {row: _of_shares(stack, devices) for row, stack in matrices.items()}
    results = {}
    for row, stack in stacks.items():
        found = _divided(_from_matrices(row, matrices[row], stack.shape), devices)
        found = _divided(found, devices, _MODEL_AXES)
        if devices > 1:
            found = jax.lax.with_sharding_constraint(found, row.spec)
        splits = [sum(len(leaf) for leaf in kinds[row][:i]) for i in range(1, len(kinds[row]))]
        results[row] = iter(jnp.split(found, splits))
    return jax.tree.unflatten(structure, [next(results[rows_of(leaf_name(path))[0]]) for path, _ in leaves])


def _divided(stack: jax.Array, devices: int, axes: tuple[str, ...] = _AXES) -> jax.Array:
    """The stack, whole matrices of it on each device, or on each part of the mesh along some of its axes.

    Told before and after each change of shape, and one exchange at a time: XLA moves what is sharded along rows or
    columns to where it is whole by one all-to-all, but gathers all where it is to do that and more at once.
    """
    return stack if devices == 1 else jax.lax.with_sharding_constraint(stack, PartitionSpec(axes))


def _of_shares(matrices: jax.Array, devices: int) -> jax.Array:
    """`_of_stack`, each device at its share of the matrices; padded with zeros to as many for each."""
    if devices == 1:
        return _of_stack(matrices)
    padded = jnp.pad(matrices, ((0, -len(matrices) % devices), (0, 0), (0, 0)))
    shares = PartitionSpec(_AXES)
    return jax.shard_map(_of_stack, in_specs=shares, out_specs=shares, check_vma=False)(padded)[: len(matrices)]


def _of_stack(matrices: jax.Array) -> jax.Array:
    """Orthogonalised matrices [M, S, R], S ≤ R, of RMS `RMS`; zeros stay zeros."""
    updates, _ = _newton_schulz.update(matrices, _newton_schulz.init(matrices))
    return updates


def _at_once(matrices: dict[Parameter, jax.Array], devices: int) -> dict[Parameter, jax.Array]:
    """`_of_shares` of all kinds in one stack, padded with columns of zeros."""
    size = max(stack.shape[2] for stack in matrices.values())
    padded = [jnp.pad(stack, ((0, 0), (0, 0), (0, size - stack.shape[2]))) for stack in matrices.values()]
    results, start = {}, 0
    updates = _of_shares(jnp.concatenate(padded), devices)
    for row, stack in matrices.items():
        results[row] = updates[start : start + len(stack), :, : stack.shape[2]]
        start += len(stack)
    return results


def _as_matrices(row: Parameter, stack: jax.Array) -> jax.Array:
    """A kernel's stack as matrices [M, S, R], transposed where that takes S ≤ R."""
    num_inputs = math.prod(stack.shape[axis] for axis in row.input_axes)
    matrices = stack.reshape(len(stack), num_inputs, -1)
    return matrices.swapaxes(1, 2) if num_inputs > matrices.shape[2] else matrices


def _from_matrices(row: Parameter, matrices: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `_as_matrices`, scaled to `RMS`."""
    num_inputs = math.prod(shape[axis] for axis in row.input_axes)
    scale = RMS * math.sqrt(matrices.shape[2])
    if num_inputs == matrices.shape[2] != matrices.shape[1]:
        matrices = matrices.swapaxes(1, 2)
    return (scale * matrices).reshape(shape)
