"""Muon for the hidden matrices of all blocks, its orthogonalisation divided among the devices."""

import dataclasses
import functools
import itertools
import math
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from tarflow_jax.runtime import leaf_name
from tarflow_jax.runtime.parameters import Parameter, rows_of

BETA = 0.95
RMS = 0.2  # of an update's numbers: as large as AdamW's, so that rates and weight decay carry over (2502.16982)
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # the coefficients of each of the five steps (Jordan et al. 2024)


def muon(learning_rate: optax.Schedule, weight_decay: float, dtype: DTypeLike) -> optax.GradientTransformation:
    """Nesterov momentum, orthogonalised (Jordan et al. 2024), for trees of `is_hidden_matrix` leaves alone.

    Its directions are rounded to `dtype`, that of the matrix products, in which devices send them to each other.
    """
    trace = optax.trace(BETA)

    def update(gradients: Any, state: Any, _: Any = None) -> tuple[Any, Any]:
        momentum, new_state = trace.update(gradients, state)
        return orthogonalised(gradients, momentum, dtype), new_state

    return optax.chain(
        optax.GradientTransformation(trace.init, update),
        optax.scale(RMS),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def is_hidden_matrix(path: tuple[Any, ...]) -> bool:
    """Whether Muon is for the parameter at `path`: a kernel of a layer, not a bias, a norm, an embedding or a
    projection from or to pixels."""
    row = _row(path)
    return row.stacked and bool(row.input_axes)


def orthogonalised(gradients: Any, momentum: Any, dtype: DTypeLike) -> Any:
    """Of Nesterov's gradient + `BETA` momentum, U S Vᵀ of every matrix, U Vᵀ (about, by Newton-Schulz steps) times the
    root of its longer side; rounded to `dtype`.

    Each device of the mesh in force computes its share of the layers. It takes that out of gradients in `dtype`, which
    they come in: XLA would write all of them in float32 first.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(momentum)
    kinds: dict[str, list[tuple[jax.Array, jax.Array]]] = defaultdict(list)  # of all blocks, by the kernels' name
    for (path, leaf), gradient in zip(leaves, jax.tree.leaves(gradients), strict=True):
        kinds[_row(path).name].append((gradient.astype(dtype), leaf))
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {} if mesh.empty else dict(mesh.shape)
    results = {}
    for name, stacks in kinds.items():
        row = rows_of(name)[0]
        directions = functools.partial(_directions, row, *_longer_side(row, stacks[0][0]), dtype, sizes)
        if not mesh.empty:
            directions = jax.shard_map(directions, in_specs=row.spec, out_specs=row.spec, check_vma=False)
        results[name] = iter(directions(stacks))
    return jax.tree.unflatten(structure, [next(results[_row(path).name]) for path, _ in leaves])


def _directions(
    row: Parameter,
    long_side: int,
    length: int,
    dtype: DTypeLike,
    sizes: dict[str, int],
    stacks: list[tuple[jax.Array, jax.Array]],
) -> list[jax.Array]:
    """What a device does for gradients and momentum of a kind, of which it has what the parameters' sharding gives it.

    What all devices along "data" have they divide, and gather the results. Of its share, what is divided along rows or
    columns goes to where it is whole by an all-to-all along each of the other axes, and back.
    """
    gradients, momentum = ([_as_matrices(row, stack) for stack in of_all] for of_all in zip(*stacks, strict=True))
    shared = _Division.of("data", sizes.get("data", 1), long_side, momentum)
    own = shared.share(gradients).astype(jnp.float32) + BETA * shared.share(momentum)
    moved = []
    for i, axis in enumerate(row.spec):
        if axis and sizes.get(axis, 1) > 1:
            division, side = _Division.of(axis, sizes[axis], long_side, [own]), 1 if i in row.input_axes else 2
            own = division.exchanged(own, side)
            moved.append((division, side))
    own = _newton_schulz(own, long_side == 1, [shared, *(division for division, _ in moved)])
    own = (math.sqrt(length) * own).astype(dtype)
    for division, side in reversed(moved):
        own = division.returned(own, side)
    kernels = shared.gathered(own).reshape(-1, *stacks[0][0].shape[1:])
    ends = list(itertools.accumulate(map(len, momentum)))
    return [of_block.astype(jnp.float32) for of_block in jnp.split(kernels, ends[:-1])]


@dataclasses.dataclass(frozen=True)
class _Division:
    """How the devices along an axis of the mesh divide stacked matrices [layers, inputs, outputs] among them.

    Of at most as many devices as layers, each has whole layers. Of more, several have a layer: of every matrix each a
    part of the longer side, so that what they sum in a step is but the shorter side squared.
    """

    axis: str
    devices: int
    long_side: int  # 1 or 2
    layers: int
    parts: int  # devices that share a layer
    size: int  # layers of a device, those behind the last one included

    @classmethod
    def of(cls, axis: str, devices: int, long_side: int, stacks: list[jax.Array]) -> "_Division":
        """Of stacks, one behind the other."""
        layers, length = sum(map(len, stacks)), stacks[0].shape[long_side]
        counts = range(1, devices // layers + 1)
        parts = max((n for n in counts if devices % n == length % n == 0), default=1)
        return cls(axis, devices, long_side, layers, parts, -(-layers * parts // devices))

    def share(self, stacks: list[jax.Array]) -> jax.Array:
        """This device's of stacks that all devices have, which are not joined first: XLA would write them all.

        Behind the last layer the last ones are taken again.
        """
        if self.devices == 1:
            return jnp.concatenate(stacks)
        here = jax.lax.axis_index(self.axis)
        step = math.gcd(self.size, *map(len, stacks))  # layers of one block, that one device has
        shape = [step, *stacks[0].shape[1:]]
        shape[self.long_side] //= self.parts
        corner = [here % self.parts * shape[side] if side == self.long_side else 0 for side in (1, 2)]
        taken = []
        for first in range(0, self.size, step):
            layer = here // self.parts * self.size + first
            found, begin = jax.lax.dynamic_slice(stacks[0], (layer, *corner), shape), len(stacks[0])
            for stack in stacks[1:]:
                values = jax.lax.dynamic_slice(stack, (layer - begin, *corner), shape)
                found, begin = jnp.where(layer < begin, found, values), begin + len(stack)
            taken.append(found)
        return jnp.concatenate(taken)

    def gathered(self, own: jax.Array) -> jax.Array:
        """The whole stacks, joined, of every device's share."""
        return own if self.devices == 1 else self._joined(jax.lax.all_gather(own, self.axis, tiled=True))

    def exchanged(self, x: jax.Array, side: int) -> jax.Array:
        """This device's share of matrices of which every device has a part of one side."""
        x = jnp.pad(x, ((0, self.size * self.devices // self.parts - len(x)), (0, 0), (0, 0)))
        x = jnp.moveaxis(_split(x, self.long_side, self.parts), self.long_side, 1)
        x = jax.lax.all_to_all(x.reshape(self.devices, self.size, *x.shape[2:]), self.axis, 0, 0, tiled=True)
        return _merged(jnp.moveaxis(x, 0, side), side)

    def returned(self, own: jax.Array, side: int) -> jax.Array:
        """The inverse of `exchanged`."""
        x = jnp.moveaxis(_split(own, side, self.devices), side, 0)
        return self._joined(jax.lax.all_to_all(x, self.axis, 0, 0, tiled=True))

    def total(self, x: jax.Array) -> jax.Array:
        """The sum over the devices that share a layer."""
        if self.parts == 1:
            return x
        members = [list(range(first, first + self.parts)) for first in range(0, self.devices, self.parts)]
        return jax.lax.psum(x, self.axis, axis_index_groups=members)

    def _joined(self, x: jax.Array) -> jax.Array:
        """Whole matrices of the devices' shares, one behind the other."""
        x = jnp.moveaxis(x.reshape(-1, self.parts, *x.shape[-2:]), 1, self.long_side)
        return _merged(x, self.long_side)[: self.layers]


def _newton_schulz(x: jax.Array, tall: bool, divisions: list[_Division]) -> jax.Array:
    """Five Newton-Schulz steps: matrices whose singular values are about 1. (optax's are of whole matrices alone.)"""

    def total(x: jax.Array) -> jax.Array:
        return functools.reduce(lambda x, division: division.total(x), divisions, x)

    def step(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        a, b, c = _NEWTON_SCHULZ
        square = total(jnp.einsum("lio,lip->lop" if tall else "lio,ljo->lij", x, x))
        factor = b * square + c * square @ square
        return a * x + (x @ factor if tall else factor @ x), None

    norm = jnp.sqrt(total(jnp.sum(x**2, axis=(1, 2), keepdims=True)))
    return jax.lax.scan(step, x / (norm + 1e-8), length=5)[0]  # a loop is compiled once


def _split(x: jax.Array, axis: int, count: int) -> jax.Array:
    return x.reshape(*x.shape[:axis], count, -1, *x.shape[axis + 1 :])


def _merged(x: jax.Array, axis: int) -> jax.Array:
    """An axis and the next one as one."""
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _as_matrices(row: Parameter, stack: jax.Array) -> jax.Array:
    """A stack of kernels, or a part of one, as [layers, inputs, outputs]."""
    return stack.reshape(len(stack), math.prod(stack.shape[axis] for axis in row.input_axes), -1)


def _longer_side(row: Parameter, stack: jax.Array) -> tuple[int, int]:
    """Its axis of the kernels as matrices, and its length."""
    num_inputs = math.prod(stack.shape[axis] for axis in row.input_axes)
    num_outputs = math.prod(stack.shape[axis] for axis in row.output_axes)
    return (1, num_inputs) if num_inputs >= num_outputs else (2, num_outputs)


def _row(path: tuple[Any, ...]) -> Parameter:
    (row,) = rows_of(leaf_name(path))
    return row
