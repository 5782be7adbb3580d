"""One optimizer step: its configuration, the state that it updates, and its compiled program."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from tarflow_jax.flow import cast_kernels
from tarflow_jax.runtime import shardings, use_mesh
from tarflow_jax.training.optimizer import Optimizer
from tarflow_jax.training.task import Batch, Metrics, Task


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Determines the state and the step of a run. Hashable, because compiled programs are cached by it."""

    task: Task
    optimizer: Optimizer
    accumulation: int = 1  # microbatches per step


class TrainState(flax.struct.PyTreeNode):
    """The complete state of a run."""

    step: jax.Array  # int32 scalar, steps taken
    variables: dict[str, Any]  # the task's: {"params": …} and, in VP mode, {"prior": {"variance": [T, D]}}
    opt_state: optax.OptState
    ema_params: dict[str, Any] | None  # exponential moving average of the parameters

    @property
    def sampling_variables(self) -> dict[str, Any]:
        """The variables, with averaged parameters if an average is kept."""
        if self.ema_params is None:
            return self.variables
        return {**self.variables, "params": self.ema_params}


def initial_state(config: TrainConfig, key: jax.Array) -> TrainState:
    """Returns the state before the first step."""
    variables = config.task.init(key)
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        variables=variables,
        opt_state=config.optimizer.transformation().init(params),
        # A copy: the state is donated, and a buffer cannot be donated twice.
        ema_params=jax.tree.map(jnp.copy, params) if config.optimizer.ema_decay else None,
    )


@functools.cache
def abstract_state(config: TrainConfig, mesh: Mesh) -> TrainState:
    """Returns shapes, dtypes and shardings of the state (`jax.ShapeDtypeStruct`), without allocating any array."""
    shapes = jax.eval_shape(functools.partial(initial_state, config), jax.random.key(0))
    return jax.tree.map(lambda leaf, sharding: leaf.update(sharding=sharding), shapes, shardings(mesh, shapes))


def new_state(config: TrainConfig, mesh: Mesh, key: jax.Array, initial: Mapping[str, Any] | None = None) -> TrainState:
    """Returns `initial_state` with every array created in its sharding, never whole on one device.

    The variables in `initial` are broadcast and replace those of the same name; parameters also replace their moving
    average.
    """
    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
    state = jax.jit(functools.partial(initial_state, config), out_shardings=layout)(key)
    if not initial:
        return state

    def replaced(old: Any, new: Any) -> Any:
        if isinstance(old, dict):
            return old | {name: replaced(old[name], values) for name, values in new.items()}
        return jax.device_put(np.broadcast_to(new, old.shape).astype(np.float32), old.sharding)

    average = state.ema_params and replaced(state.ema_params, initial.get("params", {}))
    return state.replace(variables=replaced(state.variables, initial), ema_params=average)


@functools.cache
def jitted_step(config: TrainConfig, mesh: Mesh) -> Any:
    """Returns `train_step` of a config as a jitted function that donates the state; use it under `use_mesh`."""
    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
    return jax.jit(functools.partial(train_step, config), donate_argnums=0, out_shardings=(layout, None))


def compiled_step(config: TrainConfig, mesh: Mesh) -> Callable[..., tuple[TrainState, Metrics]]:
    """Returns `jitted_step`, each call of which is under the mesh."""
    return use_mesh(mesh)(jitted_step(config, mesh))


def train_step(
    config: TrainConfig, state: TrainState, images: jax.Array, labels: jax.Array, key: jax.Array, frozen: Any = None
) -> tuple[TrainState, Metrics]:
    """Takes one step; returns the new state and the metrics.

    Args:
      images: uint8 [B, H, W, K], or what else the task takes, such as `Arrays`.
      labels: int32 [B].
      key: together with the step and an image's row in the global batch, it determines all randomness, on any
        devices.
      frozen: arrays that the task reads but training does not change, a `Frozen`.
    """
    task, optimizer, params = config.task, config.optimizer, state.variables["params"]

    # Noise, of the whole batch.
    batch = task.prepare(jax.random.fold_in(key, state.step), images, labels)

    # Loss, of a microbatch.
    def loss(params: Any, microbatch: Batch) -> tuple[jax.Array, tuple[Metrics, Any]]:
        return task.loss({**state.variables, "params": params}, microbatch, frozen)

    # Gradients. Casting once per step, outside of them, also gives them the narrow dtype.
    narrow = cast_kernels(params, task.dtype)
    gradients, metrics, outputs = accumulated_gradients(loss, narrow, batch, config.accumulation)
    gradients = jax.tree.map(lambda gradient, param: gradient.astype(param.dtype), gradients, params)

    # Update, of parameters, their average, and what the task updates without gradients.
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
        updates, opt_state = optimizer.transformation(task.dtype).update(gradients, state.opt_state, params)
    params = optax.apply_updates(params, updates)
    ema_params = state.ema_params
    if ema_params is not None:
        # Shorter at first: the initial parameters would still count for a seventh after 2 / (1 - decay) steps.
        decay = jnp.minimum(optimizer.ema_decay, (1 + state.step) / (10 + state.step))
        ema_params = optax.incremental_update(params, ema_params, 1 - decay)
    variables, metrics = task.finish({**state.variables, "params": params}, metrics, outputs)
    metrics = {**metrics, "grad_norm": optax.tree.norm(gradients)}
    return TrainState(state.step + 1, variables, opt_state, ema_params), metrics


def accumulated_gradients(loss: Callable[..., Any], params: Any, batch: Batch, count: int) -> tuple[Any, Metrics, Any]:
    """Returns the mean gradients and metrics of `count` microbatches, and the outputs of all of them.

    If the mesh shards only the batch, each device sums the gradients of its microbatches, and one all-reduce per
    step sums those of the devices. If parameters are sharded too, there is one per microbatch, because XLA's
    partitioner fails on a sum over one axis inside a program that it partitions along the others.
    """
    gradient = jax.grad(loss, has_aux=True)
    if count == 1:
        gradients, (metrics, outputs) = gradient(params, batch)
        return gradients, metrics, outputs

    def split(x: jax.Array) -> jax.Array:
        # Strided, so that no row moves to another device.
        return x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)

    def means(params: Any, batch: Batch) -> tuple[Any, Metrics, Any]:
        def accumulate(total: Any, microbatch: Batch) -> tuple[Any, Any]:
            gradients, (metrics, outputs) = gradient(params, microbatch)
            return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, (gradients, metrics)), outputs

        microbatches = jax.tree.map(split, batch)
        shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], microbatches))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), (shapes[0], shapes[1][0]))
        total, outputs = jax.lax.scan(accumulate, zeros, microbatches)
        gradients, metrics = jax.tree.map(lambda leaf: leaf / count, total)
        # Norms become means over microbatches. The order of the outputs does not matter: tasks take means over rows.
        return gradients, metrics, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.shape["data"] < mesh.size:
        return means(params, batch)

    def local_means(params: Any, batch: Batch) -> tuple[Any, Metrics, Any]:
        with nn.logical_axis_rules(()):  # each device works alone
            gradients, metrics, outputs = means(params, batch)
        return *jax.lax.pmean((gradients, metrics), mesh.axis_names), outputs

    rows, everywhere = PartitionSpec("data"), PartitionSpec()
    run = jax.shard_map(
        local_means, in_specs=(everywhere, rows), out_specs=(everywhere, everywhere, rows), check_vma=False
    )
    return run(params, batch)
