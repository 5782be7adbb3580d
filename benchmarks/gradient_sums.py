"""Measures the loss of accuracy when gradients of bfloat16 models are summed over devices in bfloat16.

    python -m benchmarks.gradient_sums [--steps=300] [--seeds=3]

Trains digits with bfloat16 matmuls on 32 simulated devices. Kernel gradients are added one after the other, as in a
ring all-reduce, with each sum rounded to bfloat16 or kept in float32. Then compares both sums for 8 to 256 devices.
"""

import argparse
import functools
import itertools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs import digits
from tarflow_jax.data import train_batches
from tarflow_jax.flow import cast_kernels
from tarflow_jax.training import Recipe, step
from tarflow_jax.training.loop import evaluate_loss, run_keys


def ring(devices: int, dtype: str, loss: step.Loss, params: Any, batch: Any, count: int) -> tuple[Any, Any, Any]:
    """`step.accumulated_gradients` over simulated devices, whose sums of bfloat16 gradients have this dtype."""
    rows = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch)
    gradients, (metrics, outputs) = jax.vmap(jax.grad(loss, has_aux=True), (None, 0))(params, rows)
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, dtype if p.dtype == jnp.bfloat16 else p.dtype), params)
    add = functools.partial(jax.tree.map, lambda total, gradient: total + gradient.astype(total.dtype))
    total, _ = jax.lax.scan(lambda total, own: (add(total, own), None), zeros, gradients)
    return jax.tree.map(lambda x: x / devices, total), jax.tree.map(lambda x: x.mean(0), metrics), outputs


def trained(dtype: str, steps: int, seed: int) -> tuple[Recipe, Any]:
    """Returns the recipe and the variables after `steps` steps on 32 devices, one image each."""
    config = digits.get_config("smoke")
    config.model.dtype = "bfloat16"
    config.train.update({"num_steps": steps, "batch_size": 32, "seed": seed})
    recipe, (init_key, key) = Recipe(config), run_keys(seed)
    state = jax.jit(functools.partial(step.initial_state, recipe.train_config))(init_key)
    with mock.patch.object(step, "accumulated_gradients", functools.partial(ring, 32, dtype)):
        take = jax.jit(functools.partial(step.train_step, recipe.train_config))
        for batch in itertools.islice(train_batches(recipe.source("train"), batch_size=32, seed=seed), steps):
            state, _ = take(state, batch.image, batch.label, key)
    return recipe, state.variables


def relative_error(recipe: Recipe, variables: Any, devices: int) -> float:
    """Of the gradient of 256 training images, summed in bfloat16."""
    batch = recipe.task.prepare(jax.random.key(0), *recipe.source("train").read(np.arange(256)))
    params = cast_kernels(variables["params"], recipe.task.dtype)

    def summed(dtype: str) -> Any:
        gradients, *_ = ring(devices, dtype, lambda p, b: recipe.task.loss({"params": p}, b, None), params, batch, 1)
        return jax.tree.map(lambda x: x.astype(jnp.float32), gradients)

    found, exact = (jax.jit(summed, static_argnums=0)(dtype) for dtype in ("bfloat16", "float32"))
    return float(optax.tree.norm(optax.tree.sub(found, exact)) / optax.tree.norm(exact))


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of a run")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind")
    args = parser.parse_args()
    for dtype in ("float32", "bfloat16"):
        runs = [trained(dtype, args.steps, seed) for seed in range(args.seeds)]
        print(f"sums in {dtype}: test losses", *(f"{evaluate_loss(*run):.4f}" for run in runs), flush=True)
    for devices in (8, 32, 256):
        print(f"{devices} devices: relative error {relative_error(*runs[0], devices):.2g}", flush=True)


if __name__ == "__main__":
    main()
