"""The baseline before transformers: an affine coupling flow (flowjax), as large and trained as long as ours.

    pip install flowjax
    python -m benchmarks.coupling --parameters=N --seconds=S [--rows=docs/results/coupling.csv]

Learns the images of configs/sweeps/small.py:likelihood, fashion_mnist with uniform dequantisation: eight coupling
layers with permutations between them, conditioner networks of two hidden layers, Adam with a cosine schedule for S
seconds of steps. The learning rate is the best of four, each tried for a fifth of that time on seed 0. A row per seed
has bits/dim of the test images and the distance of 2,500 samples.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import paramax
from flowjax.distributions import Normal
from flowjax.flows import coupling_flow

from benchmarks.common import add_row
from benchmarks.sample_metrics import SampleMetrics
from configs.sweeps.small import SEEDS
from tarflow_jax.likelihood import bits_per_dim
from tarflow_jax.noise import Noise

LAYERS, BATCH, SAMPLES = 8, 64, 2500
RATES = (1e-3, 3e-3, 1e-2, 3e-2)


def split(flow: Any) -> tuple[Any, Any]:
    """What of a flow is trained, and the rest."""
    return eqx.partition(flow, eqx.is_inexact_array, is_leaf=lambda leaf: isinstance(leaf, paramax.NonTrainable))


def num_parameters(flow: Any) -> int:
    """Numbers that are trained."""
    return sum(leaf.size for leaf in jax.tree.leaves(split(flow)[0]))


def new_flow(key: jax.Array, num_dims: int, parameters: int) -> Any:
    """A coupling flow over [num_dims] whose hidden layers are the first to give it as many parameters."""
    for hidden in range(8, 4096, 8):
        base = Normal(jnp.zeros(num_dims))
        flow = coupling_flow(key, base_dist=base, flow_layers=LAYERS, nn_width=hidden, nn_depth=2)
        if num_parameters(flow) >= parameters:
            return flow
    raise ValueError(f"{parameters} parameters are too many")


def trained(seed: int, images: np.ndarray, parameters: int, seconds: float, rate: float) -> tuple[Any, int]:
    """A flow after as many steps as the seconds allow, and how many those were."""
    init_key, noise_key = jax.random.split(jax.random.key(seed))
    params, static = split(new_flow(init_key, images[0].size, parameters))

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return -paramax.unwrap(eqx.combine(params, static)).log_prob(x).mean() / x.shape[1]

    def make_step(optimizer: optax.GradientTransformation) -> Any:
        @eqx.filter_jit
        def step(params: Any, state: Any, batch: jax.Array, key: jax.Array) -> Any:
            x = Noise("uniform")(key, batch).reshape(BATCH, -1)
            value, gradient = jax.value_and_grad(loss)(params, x)
            updates, state = optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), state, value

        return step

    rng = np.random.default_rng(seed)

    def run(num_steps: int) -> tuple[Any, float]:
        schedule = optax.warmup_cosine_decay_schedule(0, rate, num_steps // 10 + 1, num_steps)
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
        step, now, state = make_step(optimizer), params, optimizer.init(params)
        for number in range(num_steps):
            if number == 5:
                began = time.perf_counter()
            batch = jnp.asarray(images[rng.integers(len(images), size=BATCH)])
            now, state, value = step(now, state, batch, jax.random.fold_in(noise_key, number))
            value.block_until_ready()
        return now, (time.perf_counter() - began) / (num_steps - 5)

    num_steps = int(seconds / run(105)[1])
    return paramax.unwrap(eqx.combine(run(num_steps)[0], static)), num_steps


def bits_of(flow: Any, images: np.ndarray) -> float:
    """Bits per dimension of 8-bit images [N, H, W, K]."""
    log_prob = eqx.filter_jit(flow.log_prob)
    parts = np.array_split(np.arange(len(images)), len(images) // 500)
    keys = jax.random.split(jax.random.key(0), len(parts))
    noisy = (Noise("uniform")(key, jnp.asarray(images[part])) for key, part in zip(keys, parts, strict=True))
    of_parts = [np.asarray(log_prob(x.reshape(len(x), -1)), np.float64) for x in noisy]
    return float(np.mean(bits_per_dim(np.concatenate(of_parts), images[0].size)))


def main() -> None:
    """Tunes, trains, measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, required=True, help="at least as many")
    parser.add_argument("--seconds", type=float, required=True, help="of steps")
    parser.add_argument("--rows", type=Path, default=Path("docs/results/coupling.csv"), help="appended to")
    args = parser.parse_args()
    metrics = SampleMetrics("fashion_mnist")
    images, tests = (source.read(np.arange(len(source)))[0] for source in (metrics.train, metrics.test))
    tried = {
        rate: bits_of(trained(0, images, args.parameters, args.seconds / 5, rate)[0], images[:2000]) for rate in RATES
    }
    print(tried)
    rate = min(tried, key=tried.__getitem__)
    for seed in SEEDS:
        flow, num_steps = trained(seed, images, args.parameters, args.seconds, rate)
        samples = flow.sample(jax.random.key(seed), (SAMPLES,)).reshape(SAMPLES, *images.shape[1:])
        row = {"train.seed": seed, "learning_rate": rate, "steps": num_steps, "parameters": num_parameters(flow)}
        add_row(args.rows, row | {"bits/dim": bits_of(flow, tests)} | metrics(samples))


if __name__ == "__main__":
    main()
