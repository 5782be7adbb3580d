"""One optimizer step."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from tarflow_jax.flow import TarFlow, cast_kernels, updated_prior
from tarflow_jax.likelihood import training_loss
from tarflow_jax.noise import to_float
from tarflow_jax.runtime import Program, device_flow, training_kernels
from tarflow_jax.sampling import guided_trajectory
from tarflow_jax.student import distillation_loss
from tarflow_jax.student.loss import flow_trajectory
from tarflow_jax.training.state import TrainConfig, TrainState, abstract_state

Metrics = dict[str, jax.Array]
Batch = tuple[Any, ...]  # arrays [B, …]
Loss = Callable[[Any, Batch], tuple[jax.Array, tuple[Metrics, Any]]]  # of parameters and a batch


@functools.cache
def compiled_step(config: TrainConfig, mesh: Mesh) -> Program:
    """`train_step` of a config, as a program; the state is donated."""
    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
    step = jax.jit(functools.partial(train_step, config), donate_argnums=0, out_shardings=(layout, None))
    return Program(step, mesh)


def train_step(
    config: TrainConfig,
    state: TrainState,
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array,
    frozen_flow: dict[str, Any] | None = None,
    perception: dict[str, Any] | None = None,
) -> tuple[TrainState, Metrics]:
    """One step of the optimizer.

    Args:
      images: uint8 [B, H, W, K].
      labels: int32 [B].
      key: all randomness is a function of it, of the step, and of an image's row in the global batch, so that it does
        not depend on the devices.
      frozen_flow: variables of the flow by which a student is trained.
      perception: parameters of the `Perception` by which it is.
    """
    optimizer, params = config.optimizer, state.variables["params"]
    dtype = (config.student.shape if config.student else config.model).compute_dtype
    noise_key, drop_key = jax.random.split(jax.random.fold_in(key, state.step))
    labels = jnp.where(jax.random.bernoulli(drop_key, config.drop_label, labels.shape), -1, labels)
    if config.student:
        batch, loss = _distillation(config, frozen_flow, perception, images, labels, noise_key)
    else:
        batch, loss = _likelihood(config, state.variables, images, labels, noise_key)
    # So cast once a step, not once a microbatch, and their gradients move as few bytes.
    gradients, metrics, z = accumulated_gradients(loss, cast_kernels(params, dtype), batch, config.accumulation)
    gradients = jax.tree.map(lambda gradient, param: gradient.astype(param.dtype), gradients, params)

    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
        updates, opt_state = optimizer.transformation(dtype).update(gradients, state.opt_state, params)
    params = optax.apply_updates(params, updates)
    variables = {**state.variables, "params": params}
    if "prior" in variables:
        variables["prior"] = {"variance": updated_prior(state.variables["prior"]["variance"], z)}
    ema_params = state.ema_params
    if ema_params is not None:
        ema_params = optax.incremental_update(params, ema_params, 1 - optimizer.ema_decay)
    metrics["grad_norm"] = optax.tree.norm(gradients)
    return TrainState(state.step + 1, variables, opt_state, ema_params), metrics


def _likelihood(
    config: TrainConfig, variables: dict[str, Any], images: jax.Array, labels: jax.Array, key: jax.Array
) -> tuple[Batch, Loss]:
    """What a flow is trained on, noise included, and its loss."""
    levels = config.noise.levels(jax.random.fold_in(key, 1), len(images))
    noisy = config.noise(key, images, None if levels is None else levels.std)

    flow = TarFlow(config.model, training_kernels(config.model))

    def loss(params: Any, batch: Batch) -> tuple[jax.Array, Any]:
        return training_loss(flow, {**variables, "params": params}, *batch)

    return (noisy, labels, levels), loss


def _distillation(
    config: TrainConfig, frozen_flow: Any, perception: Any, images: jax.Array, labels: jax.Array, key: jax.Array
) -> tuple[Batch, Loss]:
    """What a student is trained on, noise included, and its loss.

    The noise is of the level at which samples are drawn. Half of the images have guidance weights, uniformly drawn, and
    the latents of which guided sampling makes them.
    """
    student = config.student
    assert student is not None
    levels = jnp.full(len(images), config.noise.std_max) if config.noise.kind == "levels" else None
    noisy = config.noise(key, images, levels)
    draw_key, guide_key = jax.random.split(jax.random.fold_in(key, 1))
    weights = student.max_guidance * jax.random.uniform(draw_key, labels.shape)
    weights = jnp.where((labels >= 0) & jax.random.bernoulli(guide_key, 0.5, labels.shape), weights, 0.0)

    def loss(params: Any, batch: Batch) -> tuple[jax.Array, Any]:
        clean, noisy, labels, levels, weights = batch
        if student.max_guidance:
            path = guided_trajectory(device_flow(config.model), frozen_flow, noisy, labels, weights, levels)
        else:
            path = flow_trajectory(device_flow(config.model), frozen_flow, noisy, labels, levels)
        value, metrics = distillation_loss(student, {"params": params}, clean, *path, labels, weights, perception)
        return value, (metrics, None)

    return (to_float(images), noisy, labels, levels, weights), loss


def accumulated_gradients(loss: Loss, params: Any, batch: Batch, count: int) -> tuple[Any, Metrics, Any]:
    """Mean gradients and metrics of `count` microbatches, and what else the loss gives: a flow's z [B, T, D].

    If the mesh in force shards the batch alone, each device sums its own microbatches, and gradients cross the
    devices once a step. Where parameters are sharded too, they cross them with every microbatch: XLA's partitioner
    fails on a sum of one axis within a program that it partitions along the others.
    """

    gradient = jax.grad(loss, has_aux=True)
    if count == 1:
        gradients, (metrics, z) = gradient(params, batch)
        return gradients, metrics, z

    means = functools.partial(_means, gradient, count)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.shape["data"] < mesh.size:
        return means(params, batch)

    def of_own_rows(params: Any, batch: Batch) -> tuple[Any, Metrics, Any]:
        with nn.logical_axis_rules(()):  # each device works alone
            gradients, metrics, z = means(params, batch)
        return *jax.lax.pmean((gradients, metrics), mesh.axis_names), z

    rows, everywhere = PartitionSpec("data"), PartitionSpec()
    run = jax.shard_map(
        of_own_rows, in_specs=(everywhere, rows), out_specs=(everywhere, everywhere, rows), check_vma=False
    )
    return run(params, batch)


def _means(gradient: Callable[..., Any], count: int, params: Any, batch: Batch) -> tuple[Any, Metrics, Any]:
    """`gradient`'s values over `count` microbatches, one after another: what `accumulated_gradients` returns."""

    def split(x: jax.Array) -> jax.Array:
        # Strided, so that each device keeps its own rows in every microbatch.
        return x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)

    def accumulate(total: Any, microbatch: Batch) -> tuple[Any, Any]:
        gradients, (metrics, z) = gradient(params, microbatch)
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, (gradients, metrics)), z

    microbatches = jax.tree.map(split, batch)
    shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], microbatches))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), (shapes[0], shapes[1][0]))
    total, z = jax.lax.scan(accumulate, zeros, microbatches)
    gradients, metrics = jax.tree.map(lambda leaf: leaf / count, total)
    # Norms are means of microbatches' norms; z's order does not matter to its only use, a mean over rows.
    return gradients, metrics, jax.tree.map(lambda z: z.reshape(-1, *z.shape[2:]), z)
