"""Boltzmann generators: flows of particles, with samples reweighted to exp(-energy).

    python -m benchmarks.boltzmann [--systems dw4,lj13] [--num_steps 8000] [--seeds 3] [--rows FILE.jsonl]

DW4 has four particles in two dimensions, LJ13 thirteen in three (Köhler et al., arXiv 2006.02425; as there, the energy
of LJ13 counts each pair twice). The flow is trained on half of 1,000 Markov chains. What the energy leaves free may
have any density, so augmentation gives it one that affine maps fit: the centre of mass is Gaussian with a standard
deviation of 1/√N; the direction from it to the first particle is von Mises-Fisher around the first axis; the others are
numbered by their second coordinates plus Gumbel noise (Plackett-Luce). A row has the effective sample size of 10,000
weighted samples, and the mean energies of the chains, the flow, and the reweighted flow.
"""

import argparse
import functools
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

import tarflow_jax
from benchmarks.common import json_lines

NUM_CHAINS = 1000
NUM_SAMPLES = 10_000
CONCENTRATION, SHARPNESS = 100.0, 6.0  # of the first particle's direction, and of the numbers of the others


class System(NamedTuple):
    """N particles in D dimensions."""

    num_particles: int
    num_dims: int
    start: float  # initial spacing of the chains' particles
    num_moves: int  # of a chain, between two of its draws
    fit: dict[str, Any]  # arguments of `fit`


SYSTEMS = {
    "dw4": System(4, 2, 3.0, 100, {"width": 64, "num_blocks": 8, "triangular": True, "weight_decay": 0.01}),
    "lj13": System(13, 3, 1.2, 200, {"width": 64, "num_blocks": 6, "triangular": True, "weight_decay": 0.01}),
}


def pair_distances(x: jax.Array) -> jax.Array:
    """Distances of all pairs of particles [..., N, D]: [..., N (N - 1) / 2]."""
    first, second = np.triu_indices(x.shape[-2], 1)
    return jnp.sqrt(jnp.square(x[..., first, :] - x[..., second, :]).sum(-1))


def energy(name: str, x: jax.Array) -> jax.Array:
    """Energies in units of kT, whatever the centre of mass, of particles [..., N, D]."""
    distances = pair_distances(x)
    if name == "dw4":
        d = distances - 4
        return (0.9 * d**4 - 4 * d**2).sum(-1)
    centred = x - x.mean(-2, keepdims=True)
    return 2 * (distances**-12 - 2 * distances**-6).sum(-1) + 0.5 * jnp.square(centred).sum((-1, -2))


def log_density(name: str, x: jax.Array) -> jax.Array:
    """log p̃: minus the energy, and the log densities of centre of mass, direction and numbers, up to constants."""
    centre = x.mean(-2)
    first = x[..., 0, :] - centre
    scores = SHARPNESS * x[..., 1:, 1]
    remaining = jax.lax.cumlogsumexp(scores, axis=scores.ndim - 1, reverse=True)  # of particles not numbered yet
    numbers = (scores - remaining).sum(-1)
    direction = CONCENTRATION * first[..., 0] / jnp.linalg.norm(first, axis=-1)
    return -energy(name, x) - 0.5 * x.shape[-2] * jnp.square(centre).sum(-1) + direction + numbers


@functools.partial(jax.jit, static_argnums=(0, 3))
def moved(name: str, x: jax.Array, key: jax.Array, num_moves: int, size: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Langevin moves with Metropolis' test (MALA) of chains [C, N, D], and the share that was accepted."""
    gradient = jax.vmap(jax.value_and_grad(functools.partial(energy, name)))

    def move(carry: tuple[jax.Array, ...], key: jax.Array) -> tuple[tuple[jax.Array, ...], jax.Array]:
        x, e, g = carry
        noise_key, accept_key = jax.random.split(key)
        to = x - size**2 / 2 * g + size * jax.random.normal(noise_key, x.shape)
        to_e, to_g = gradient(to)
        forward = jnp.square(to - x + size**2 / 2 * g).sum((1, 2))
        backward = jnp.square(x - to + size**2 / 2 * to_g).sum((1, 2))
        log_ratio = e - to_e + (forward - backward) / (2 * size**2)
        accepted = jnp.log(jax.random.uniform(accept_key, e.shape)) < log_ratio
        chosen = [
            jnp.where(accepted.reshape(-1, *(1,) * (a.ndim - 1)), a, b) for a, b in ((to, x), (to_e, e), (to_g, g))
        ]
        return tuple(chosen), accepted.mean()

    (x, _, _), accepted = jax.lax.scan(move, (x, *gradient(x)), jax.random.split(key, num_moves))
    return x - x.mean(1, keepdims=True), accepted.mean()


def chains(name: str, num_draws: int, seed: int) -> np.ndarray:
    """Draws of Markov chains after a warm-up of half as many, float32 [draws, chains, N, D]."""
    system, rng = SYSTEMS[name], np.random.default_rng(seed)
    side = int(np.ceil(system.num_particles ** (1 / system.num_dims)))
    lattice = np.stack(np.meshgrid(*[np.arange(side)] * system.num_dims), -1).reshape(-1, system.num_dims)
    x = jnp.asarray(
        system.start * lattice[: system.num_particles]
        + 0.01 * rng.normal(size=(NUM_CHAINS, system.num_particles, system.num_dims)),
        jnp.float32,
    )
    size, drawn = jnp.asarray(0.02), []
    for number in range(num_draws + num_draws // 2):
        x, accepted = moved(name, x, jax.random.fold_in(jax.random.key(seed), number), system.num_moves, size)
        if number < num_draws // 2:
            size = size * jnp.exp(accepted - 0.6)
        else:
            drawn.append(np.asarray(x))
    return np.stack(drawn)


def augmented(rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
    """Turns, mirrors, renumbers and moves each row of [B, N, D], as the densities of `log_density` ask."""
    count, num_particles, num_dims = x.shape
    x = np.take_along_axis(x, rng.permuted(np.tile(np.arange(num_particles), (count, 1)), axis=1)[..., None], 1)
    rotation, triangle = np.linalg.qr(rng.normal(size=(count, num_dims, num_dims)))
    x = np.einsum("BND,BDE->BNE", x, rotation * np.sign(np.diagonal(triangle, axis1=1, axis2=2))[:, None])
    # A reflection takes the first particle's direction to the one that was drawn.
    first = x[:, 0] / np.linalg.norm(x[:, 0], axis=1, keepdims=True)
    axis = np.eye(num_dims)[0]
    normal = first - stats.vonmises_fisher(axis, CONCENTRATION).rvs(count, random_state=rng)
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    x = x - 2 * np.einsum("BND,BD->BN", x, normal)[..., None] * normal[:, None]
    keys = SHARPNESS * x[:, 1:, 1] + rng.gumbel(size=(count, num_particles - 1))
    others = np.take_along_axis(x[:, 1:], np.argsort(-keys, axis=1)[..., None], 1)
    centre = rng.normal(size=(count, 1, num_dims)) / np.sqrt(num_particles)
    return (np.concatenate([x[:, :1], others], axis=1) + centre).astype(np.float32)


def measure(name: str, num_steps: int, seed: int) -> dict[str, object]:
    """Fits, draws, weights."""
    system, rng = SYSTEMS[name], np.random.default_rng(seed)
    drawn = chains(name, 200, seed)
    learned = drawn[:, : NUM_CHAINS // 2].reshape(-1, system.num_particles, system.num_dims)
    others = drawn[:, NUM_CHAINS // 2 :].reshape(-1, system.num_particles, system.num_dims)
    points = augmented(rng, np.concatenate([learned] * 4))
    start = time.perf_counter()
    flow = tarflow_jax.fit(points, num_steps=num_steps, key=jax.random.key(seed), validation=0.02, **system.fit)
    seconds = time.perf_counter() - start
    weighted = tarflow_jax.importance(
        flow, jax.jit(functools.partial(log_density, name)), jax.random.key(seed), NUM_SAMPLES
    )
    energies = np.asarray(energy(name, weighted.x), np.float64)
    weights = np.exp(np.asarray(weighted.log_weights, np.float64) - float(weighted.log_weights.max()))
    truth = np.asarray(energy(name, jnp.asarray(others)))
    return {
        "ess_percent": round(100 * weighted.effective_sample_size / NUM_SAMPLES, 2),
        "energy_chains": round(float(truth.mean()), 3),
        "energy_chains_first_half": round(float(np.asarray(energy(name, jnp.asarray(learned))).mean()), 3),
        "energy_flow_median": round(float(np.median(energies)), 3),
        "energy_flow": round(float(np.clip(energies, None, 1e6).mean()), 3),
        "energy_reweighted": round(float((weights * np.clip(energies, None, 1e6)).sum() / weights.sum()), 3),
        "log_z": round(weighted.log_z, 3),
        **flow.card["training"],
        **flow.card["metrics"],
        "seconds": round(seconds, 1),
    }


def main() -> None:
    """Appends the missing rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="names, with commas between them")
    parser.add_argument("--num_steps", type=int, default=8000, help="of a fit")
    parser.add_argument("--seeds", type=int, default=3, help="chains and fits of each system")
    parser.add_argument("--rows", type=Path, default=Path("docs/results/boltzmann.jsonl"), help="file to append to")
    args = parser.parse_args()
    done = json_lines(args.rows)
    for name in args.systems.split(","):
        for seed in range(args.seeds):
            asked = {"system": name, "seed": seed, "num_steps": args.num_steps}
            if any(asked.items() <= row.items() for row in done):
                continue
            line = json.dumps(asked | measure(name, args.num_steps, seed) | {"date": time.strftime("%Y-%m-%d")})
            print(line, flush=True)
            with args.rows.open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
