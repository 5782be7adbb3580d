"""Muon for the hidden matrices of all blocks, its orthogonalisation divided among the devices."""

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from tarflow_jax.runtime import leaf_name
from tarflow_jax.runtime.parameters import Parameter, rows_of

BETA = 0.95
RMS = 0.2  # of an update's numbers: as large as AdamW's, so that rates and weight decay carry over (2502.16982)
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # the coefficients of each of the five steps (Jordan et al. 2024)
_MODEL_AXES = ("fsdp", "tensor")  # of the mesh, over which parameters are sharded

Kinds = dict[str, list[jax.Array]]  # of every kind of kernel the stacks of all blocks, [L, inputs…, outputs…]


class _Matrices(NamedTuple):
    """Matrices [M, inputs, outputs], or a part of each along its longer side."""

    values: jax.Array
    long_side: int  # its axis, 1 or 2


def muon(learning_rate: optax.Schedule, weight_decay: float, dtype: DTypeLike) -> optax.GradientTransformation:
    """Nesterov momentum, orthogonalised (Jordan et al. 2024), for trees of `is_hidden_matrix` leaves alone.

    Its directions are rounded to `dtype`, that of the matrix products, in which devices send them to each other.
    """
    return optax.chain(
        optax.trace(BETA, nesterov=True),
        optax.stateless(lambda momentum, _: orthogonalised(momentum, dtype)),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def is_hidden_matrix(path: tuple[Any, ...]) -> bool:
    """Whether Muon is for the parameter at `path`: a kernel of a layer, not a bias, a norm, an embedding or a
    projection from or to pixels."""
    row = _row(path)
    return row.stacked and bool(row.input_axes)


def orthogonalised(tree: Any, dtype: DTypeLike) -> Any:
    """Of every matrix of the kernels' stacks, U Vᵀ (about, by Newton-Schulz steps) for its U S Vᵀ, times `RMS` and the
    root of its longer side. Each device of the mesh in force computes its share of the layers."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    kinds: Kinds = defaultdict(list)
    for path, leaf in leaves:
        kinds[_row(path).name].append(leaf)
    mesh = jax.sharding.get_abstract_mesh()
    found = _divided(kinds, dtype, 1) if mesh.empty else _on_mesh(kinds, dtype, mesh)
    results = {name: iter(stacks) for name, stacks in found.items()}
    return jax.tree.unflatten(structure, [next(results[_row(path).name]).astype(leaf.dtype) for path, leaf in leaves])


def _on_mesh(kinds: Kinds, dtype: DTypeLike, mesh: jax.sharding.AbstractMesh) -> Kinds:
    """`_divided`, and what is sharded along rows or columns moved to where it is whole, and back."""
    whole = PartitionSpec(_MODEL_AXES)
    places = math.prod(mesh.shape[axis] for axis in _MODEL_AXES)
    divided = functools.partial(_divided, dtype=dtype, num_devices=mesh.shape["data"])
    divided = jax.shard_map(divided, in_specs=whole, out_specs=whole, check_vma=False)
    if places == 1:
        return divided(dict(kinds))
    # Told before and after each change of shape XLA moves stacks by one all-to-all; else it gathers them all.
    constrained = jax.lax.with_sharding_constraint
    stacks = {name: [constrained(_padded(jnp.concatenate(leaves), places), whole)] for name, leaves in kinds.items()}
    results = {}
    for name, (stack,) in divided(stacks).items():
        ends = list(itertools.accumulate(map(len, kinds[name])))
        stack = constrained(constrained(stack, whole)[: ends[-1]], rows_of(name)[0].spec)
        results[name] = jnp.split(stack, ends[:-1])
    return results


def _divided(kinds: Kinds, dtype: DTypeLike, num_devices: int) -> Kinds:
    """The orthogonalised stacks of what all devices along "data" have; each computes a share and sends it to all.

    Of at most as many devices as layers, each has whole layers. Of more, several have a layer: of every matrix each a
    part of the longer side, so that what they sum in a step is but the shorter side squared.
    """
    ends = list(itertools.accumulate(map(len, next(iter(kinds.values())))))
    matrices = {name: [_as_matrices(name, stack) for stack in stacks] for name, stacks in kinds.items()}
    sides = {name: max(stacks[0].values.shape[1:]) for name, stacks in matrices.items()}
    parts = _devices_a_layer(num_devices, ends[-1], math.gcd(*sides.values()))
    results = {}
    for name, stacks in matrices.items():
        share = _share(stacks, num_devices, parts)
        directions = _newton_schulz(share, _sum(num_devices, parts))
        sent = (RMS * math.sqrt(sides[name]) * directions).astype(dtype)
        if num_devices > 1:
            sent = jax.lax.all_gather(sent, "data", tiled=True)
        joined = jnp.moveaxis(sent.reshape(-1, parts, *sent.shape[1:]), 1, share.long_side)
        kernels = joined.reshape(-1, *kinds[name][0].shape[1:])[: ends[-1]]
        results[name] = jnp.split(kernels, ends[:-1])
    return results


def _devices_a_layer(num_devices: int, num_layers: int, width: int) -> int:
    """Into how many parts, that divide the width, layers are cut so that as many devices as can be have one."""
    counts = range(1, num_devices // num_layers + 1)
    return max((n for n in counts if num_devices % n == width % n == 0), default=1)


def _share(stacks: list[_Matrices], num_devices: int, parts: int) -> _Matrices:
    """This device's of the stacks of all blocks, which are not joined: XLA would write them all.

    Behind the last layer the last ones are taken again.
    """
    long_side, depths = stacks[0].long_side, [len(stack.values) for stack in stacks]
    if num_devices == 1:
        return _Matrices(jnp.concatenate([stack.values for stack in stacks]), long_side)
    size = -(-sum(depths) * parts // num_devices)
    step = math.gcd(size, *depths)  # layers of one block, that one device has
    here = jax.lax.axis_index("data")
    shape = [step, *stacks[0].values.shape[1:]]
    shape[long_side] //= parts
    corner = [here % parts * shape[axis] if axis == long_side else 0 for axis in (1, 2)]
    begins = [0, *itertools.accumulate(depths[:-1])]
    taken = []
    for first in range(0, size, step):
        layer = here // parts * size + first
        slices = [
            jax.lax.dynamic_slice(stack.values, (layer - begin, *corner), shape)
            for begin, stack in zip(begins, stacks, strict=True)
        ]
        found = slices[0]
        for begin, values in zip(begins[1:], slices[1:], strict=True):
            found = jnp.where(layer < begin, found, values)
        taken.append(found)
    return _Matrices(jnp.concatenate(taken), long_side)


def _sum(num_devices: int, parts: int) -> Callable[[jax.Array], jax.Array]:
    """Adds what the devices that share a layer have."""
    if parts == 1:
        return lambda x: x
    members = [list(range(first, first + parts)) for first in range(0, num_devices, parts)]
    return functools.partial(jax.lax.psum, axis_name="data", axis_index_groups=members)


def _newton_schulz(share: _Matrices, total: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Five Newton-Schulz steps: matrices whose singular values are about 1. (optax's are of whole matrices alone.)"""
    tall = share.long_side == 1

    def step(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        a, b, c = _NEWTON_SCHULZ
        square = total(jnp.einsum("mio,mip->mop" if tall else "mio,mjo->mij", x, x))
        factor = b * square + c * square @ square
        return a * x + (x @ factor if tall else factor @ x), None

    norm = jnp.sqrt(total(jnp.sum(share.values**2, axis=(1, 2), keepdims=True)))
    return jax.lax.scan(step, share.values / (norm + 1e-8), length=5)[0]  # a loop is compiled once


def _as_matrices(name: str, stack: jax.Array) -> _Matrices:
    num_inputs = math.prod(stack.shape[axis] for axis in rows_of(name)[0].input_axes)
    values = stack.reshape(len(stack), num_inputs, -1)
    return _Matrices(values, 1 if num_inputs >= values.shape[2] else 2)


def _padded(stack: jax.Array, multiple: int) -> jax.Array:
    """The stack and as many zeros behind it as make its length a multiple."""
    return jnp.pad(stack, ((0, -len(stack) % multiple), *((0, 0),) * (stack.ndim - 1)))


def _row(path: tuple[Any, ...]) -> Parameter:
    (row,) = rows_of(leaf_name(path))
    return row
