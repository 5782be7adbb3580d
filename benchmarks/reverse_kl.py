"""Compares the cost of a step of `tarflow_jax.fit_density` with one of `tarflow_jax.fit` for the same flow.

    python -m benchmarks.reverse_kl [--tokens 4 16 64] [--steps 20]

Alternates steps of both on one device, in batches of 256. Prints a row for each number of tokens.
"""

import argparse
import json
import time

import jax
import jax.numpy as jnp
import numpy as np

from tarflow_jax import TarFlowConfig
from tarflow_jax.density import DensityTask
from tarflow_jax.fitting import SHAPE
from tarflow_jax.runtime import LocalBatch, make_mesh, use_mesh
from tarflow_jax.training.optimizer import Optimizer
from tarflow_jax.training.step import TrainConfig, compiled_step, jitted_step, new_state
from tarflow_jax.training.task import Arrays, ArrayTask

BATCH_SIZE = 256


def log_density(x: jax.Array) -> jax.Array:
    """Of a standard normal, less a constant."""
    return -0.5 * jnp.square(x).sum(1)


def measure(num_tokens: int, num_steps: int) -> dict[str, object]:
    """A row: medians and minima in seconds, and MiB of temporaries."""
    config = TarFlowConfig(**SHAPE | {"sequence_shape": (num_tokens, 0)})
    mesh, key = make_mesh(devices=jax.local_devices()[:1]), jax.random.key(0)
    x = np.random.default_rng(0).standard_normal((BATCH_SIZE, num_tokens), np.float32)
    batch = jax.tree.map(LocalBatch(mesh, BATCH_SIZE).put, (Arrays(x), None))
    tasks = {"fit": ArrayTask(config), "fit_density": DensityTask(config, log_density=log_density)}
    configs = {name: TrainConfig(task, Optimizer(1000, warmup_steps=10)) for name, task in tasks.items()}
    states = {name: new_state(each, mesh, key) for name, each in configs.items()}
    row: dict[str, object] = {"tokens": num_tokens}
    for name, each in configs.items():
        with use_mesh(mesh):
            compiled = jitted_step(each, mesh).lower(states[name], *batch, key).compile()
        row[f"{name}_mib"] = round(compiled.memory_analysis().temp_size_in_bytes / 2**20)
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(num_steps + 1):
        for name, each in configs.items():
            start = time.perf_counter()
            states[name], metrics = compiled_step(each, mesh)(states[name], *batch, key)
            jax.block_until_ready(metrics)
            seconds[name].append(time.perf_counter() - start)
    for name, found in seconds.items():
        row[f"{name}_median"], row[f"{name}_min"] = round(float(np.median(found[1:])), 4), round(min(found[1:]), 4)
    factor = np.median(seconds["fit_density"][1:]) / np.median(seconds["fit"][1:])
    return row | {"factor": round(float(factor), 2), "date": time.strftime("%Y-%m-%d")}


def main() -> None:
    """Prints the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--steps", type=int, default=20, help="timed, of each")
    args = parser.parse_args()
    for num_tokens in args.tokens:
        print(json.dumps(measure(num_tokens, args.steps)), flush=True)


if __name__ == "__main__":
    main()
