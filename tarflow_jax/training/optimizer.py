"""The optimizer: learning-rate schedule, AdamW, and Muon with its layers divided among the devices."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from tarflow_jax.errors import UserError
from tarflow_jax.options import Options, option
from tarflow_jax.runtime import leaf_name
from tarflow_jax.runtime.parameters import row_of

MOMENTUM = 0.95
RMS = 0.2  # of an update, close to AdamW's, so that learning rates and weight decay carry over (Liu et al. 2025)
_COEFFICIENTS = ((3.4445, -4.7750, 2.0315),) * 5  # optax scans over one row per step, but unrolls a single row


@dataclasses.dataclass(frozen=True)
class Optimizer(Options):
    """AdamW for all parameters, as in the PyTorch release, or Muon for the hidden matrices and AdamW for the rest.

    Muon orthogonalizes the momentum of each hidden matrix by five Newton-Schulz steps (Jordan et al. 2024). Learning
    rates rise linearly from `final_learning_rate` to their peak over `warmup_steps`, and return along a cosine.
    """

    group: ClassVar[str] = "optimizer"

    num_steps: int  # of the run
    learning_rate: float = option(3e-3, "Peak learning rate of AdamW.")
    final_learning_rate: float = option(1e-6, "Learning rate of the first and last steps.")
    warmup_steps: int = option(0, "Steps of linear warm-up.")
    beta1: float = option(0.9, "Decay rate of AdamW's first moment.")
    beta2: float = option(0.95, "Decay rate of AdamW's second moment.")
    weight_decay: float = option(1e-4, "Weight decay of all parameters.")
    clip_norm: float = option(1.0, "Clips the global gradient norm to this value; 0 for no clipping.")
    ema_decay: float = option(0.0, "Decay of the exponential moving average of the parameters; 0 for none.")
    name: str = option("muon", "Muon (AdamW for all but the hidden matrices), or AdamW.", choices=("adamw", "muon"))
    muon_learning_rate: float = option(5e-3, "Peak learning rate of Muon; 0 with adamw.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta1", "beta2", "ema_decay"):
            if getattr(self, name) >= 1:
                raise UserError(f"optimizer.{name} is {getattr(self, name)}; expected 0 to less than 1")
        if (self.name == "muon") != (self.muon_learning_rate > 0):
            raise UserError(
                f"optimizer.muon_learning_rate is {self.muon_learning_rate} with optimizer.name {self.name!r}; "
                "expected a positive number with 'muon', 0 otherwise"
            )

    def schedule(self, peak: float | None = None) -> optax.Schedule:
        """Returns linear warm-up to `peak` (default: `learning_rate`) and cosine decay to `final_learning_rate`."""
        return optax.warmup_cosine_decay_schedule(
            init_value=self.final_learning_rate,
            peak_value=self.learning_rate if peak is None else peak,
            warmup_steps=self.warmup_steps,
            decay_steps=max(self.num_steps, self.warmup_steps + 1),
            end_value=self.final_learning_rate,
        )

    def transformation(self, dtype: DTypeLike = "float32") -> optax.GradientTransformation:
        """Returns the update rule; `dtype` is that of the network's matmuls."""
        update = optax.adamw(self.schedule(), b1=self.beta1, b2=self.beta2, weight_decay=self.weight_decay)
        if self.name == "muon":
            hidden = optax.chain(
                optax.trace(MOMENTUM, nesterov=True),  # without optax.contrib.muon's bias correction
                optax.stateless(lambda momentum, _: orthogonalized(momentum, dtype)),
                optax.scale(RMS),
                optax.add_decayed_weights(self.weight_decay),
                optax.scale_by_learning_rate(self.schedule(self.muon_learning_rate)),
            )
            update = optax.partition({"muon": hidden, "adamw": update}, _labels)
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), update) if self.clip_norm else update


def orthogonalized(blocks: dict[str, Any], dtype: DTypeLike) -> dict[str, Any]:
    """Orthogonalizes every matrix and scales it to a root mean square of about 1.

    Args:
      blocks: each block's kernels [layers, …], in identical trees `layers`, sharded as the parameters are.
      dtype: that of the network's matmuls, in which devices exchange the results.

    Returns the same trees with the same shardings: float32, rounded to `dtype`.
    """

    def of_all_blocks(path: tuple[Any, ...], *kernels: jax.Array) -> list[jax.Array]:
        row, ends = row_of(leaf_name(path)), list(itertools.accumulate(map(len, kernels)))
        sides = optax.contrib.MuonDimensionNumbers(row.input_axes, row.output_axes)
        function = functools.partial(_newton_schulz, sides, dtype)
        axes = jax.sharding.get_abstract_mesh().axis_names
        return jnp.split(_over_devices(axes, function, jnp.concatenate(kernels), row.spec[1:]), ends[:-1])

    first, *others = ({"layers": block["layers"]} for block in blocks.values())  # common to all blocks
    directions = jax.tree_util.tree_map_with_path(of_all_blocks, first, *others)
    directions = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), directions)
    by_block = jax.tree.transpose(jax.tree.structure(first), None, directions)
    return {name: blocks[name] | layers for name, layers in zip(blocks, by_block, strict=True)}


def _newton_schulz(sides: optax.contrib.MuonDimensionNumbers, dtype: DTypeLike, stack: jax.Array) -> jax.Array:
    """Orthogonalizes and scales a stack [layers, …] of kernels."""
    # optax does not export its Newton-Schulz iteration, but its Muon without momentum is just that.
    iteration = optax.contrib.scale_by_muon(_COEFFICIENTS, beta=0.0, nesterov=False, weight_dimension_numbers=sides)
    directions, _ = iteration.update(stack, iteration.init(stack))
    longer_side = max(math.prod(stack.shape[axis] for axis in axes) for axes in sides)
    return (math.sqrt(longer_side) * directions).astype(dtype)


def _over_devices(
    axes: Sequence[str], function: Callable[[jax.Array], jax.Array], stack: jax.Array, spec: Sequence[str | None]
) -> jax.Array:
    """Applies `function` to a stack [layers, …], with the layers divided among the devices along the mesh's `axes`.

    `spec` shards the other dimensions. XLA compiles an axis to two all-to-alls if `spec` has it, else to a slice and an
    all-gather. With all axes constrained at once, it would all-gather whole stacks.
    """
    if not axes:
        return function(stack)
    axis, *others = axes
    size = jax.sharding.get_abstract_mesh().shape[axis]
    without = [None if name == axis else name for name in spec]
    divided, constrain = PartitionSpec(axis, None, *without), jax.lax.with_sharding_constraint

    undivided = constrain(stack, PartitionSpec(None, *spec))
    padded = jnp.pad(undivided, [(0, -len(stack) % size), *[(0, 0)] * (stack.ndim - 1)])
    shares = constrain(padded.reshape(size, -1, *stack.shape[1:]), divided)
    results = jax.vmap(lambda share: _over_devices(others, function, share, without), spmd_axis_name=axis)(shares)
    gathered = constrain(constrain(results, divided), PartitionSpec(None, None, *spec))
    return gathered.reshape(-1, *stack.shape[1:])[: len(stack)]


def _labels(params: Any) -> Any:
    """Labels kernels of dense layers inside the transformer layers "muon", all other parameters "adamw"."""

    def label(path: tuple[Any, ...], _: Any) -> str:
        row = row_of(leaf_name(path))
        return "muon" if row.stacked and row.input_axes else "adamw"

    return jax.tree_util.tree_map_with_path(label, params)
