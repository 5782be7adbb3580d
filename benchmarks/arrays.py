"""Known densities: nats by which `tarflow_jax.fit` and its rivals stay above the entropy.

    python -m benchmarks.arrays [--names moons,funnel] [--seconds 60] [--seeds 3] [--rows FILE.jsonl]

Fits 20,000 points and measures the mean of log p - log q over 20,000 others: the Kullback-Leibler divergence, with its
standard error. Each method has three settings. The one with the best validation loss after half of the seconds, on
separate points, is fitted with each seed. Existing rows are skipped.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy.special import logsumexp

from benchmarks import array_rivals

NUM_POINTS = 20_000


class Target(NamedTuple):
    """A density in closed form, or by quadrature."""

    draw: Callable[[np.random.Generator, int], np.ndarray]  # points [count, F]
    log_prob: Callable[[np.ndarray], np.ndarray]  # nats [count]


def normal_log_prob(x: np.ndarray, mean: np.ndarray, std: float | np.ndarray) -> np.ndarray:
    """log N(x; mean, std² I), summed over the last axis."""
    return (-0.5 * np.square((x - mean) / std) - np.log(std) - 0.5 * np.log(2 * np.pi)).sum(-1)


def gaussian(num_dims: int) -> Target:
    """A Gaussian whose correlations are those of random factors."""
    factors = np.random.default_rng(num_dims).normal(size=(num_dims, num_dims)) / np.sqrt(num_dims)
    covariance = factors @ factors.T + 0.1 * np.eye(num_dims)
    root, inverse = np.linalg.cholesky(covariance), np.linalg.inv(covariance)
    constant = -0.5 * np.linalg.slogdet(2 * np.pi * covariance)[1]
    return Target(
        lambda rng, count: rng.normal(size=(count, num_dims)) @ root.T,
        lambda x: constant - 0.5 * np.einsum("BF,FG,BG->B", x, inverse, x),
    )


def blurred(curve: Callable[[np.ndarray], np.ndarray], std: float, num_centres: int = 2000) -> Target:
    """Uniform along a curve [0, 1) -> [F], with Gaussian noise; its density is a sum over points of the curve."""
    centres = curve((np.arange(num_centres) + 0.5) / num_centres)

    def log_prob(x: np.ndarray) -> np.ndarray:
        parts = (normal_log_prob(part[:, None], centres[None], std) for part in np.array_split(x, 100))
        return np.concatenate([logsumexp(part, axis=1) for part in parts]) - np.log(num_centres)

    def draw(rng: np.random.Generator, count: int) -> np.ndarray:
        return curve(rng.random(count)) + std * rng.normal(size=(count, 2))

    return Target(draw, log_prob)


def moons(shares: np.ndarray) -> np.ndarray:
    """Two half circles, the first for shares below a half."""
    angles, lower = 2 * np.pi * (shares % 0.5), shares >= 0.5
    x = np.where(lower, 1 - np.cos(angles), np.cos(angles))
    return np.stack([x, np.where(lower, 0.5 - np.sin(angles), np.sin(angles))], -1)


def spirals(shares: np.ndarray) -> np.ndarray:
    """Two arms of 1 1/2 turns."""
    turns, sign = 3 * np.pi * np.sqrt(2 * (shares % 0.5)), np.where(shares >= 0.5, 1.0, -1.0)
    return (sign * turns)[..., None] * np.stack([np.cos(turns), np.sin(turns)], -1) / 5


def eight_gaussians(shares: np.ndarray) -> np.ndarray:
    """Eight points on a circle."""
    angles = np.floor(8 * shares) * np.pi / 4
    return 2 * np.stack([np.cos(angles), np.sin(angles)], -1)


def funnel() -> Target:
    """Neal's funnel: v ~ N(0, 3²), and four others ~ N(0, exp(v))."""

    def draw(rng: np.random.Generator, count: int) -> np.ndarray:
        v = 3 * rng.normal(size=(count, 1))
        return np.concatenate([v, np.exp(v / 2) * rng.normal(size=(count, 4))], axis=1)

    def log_prob(x: np.ndarray) -> np.ndarray:
        v, others = x[:, :1], x[:, 1:]
        return normal_log_prob(v, np.zeros(1), 3.0) + normal_log_prob(others, np.zeros(1), np.exp(v / 2))

    return Target(draw, log_prob)


TARGETS = {
    "gaussian 6": gaussian(6),
    "gaussian 64": gaussian(64),
    "moons": blurred(moons, 0.1),
    "eight gaussians": blurred(eight_gaussians, 0.2, num_centres=8),
    "spirals": blurred(spirals, 0.1),
    "funnel": funnel(),
}


def measure(target: Target, method: str, setting: dict[str, Any], seconds: float, seed: int) -> dict[str, object]:
    """The divergence of a fit, in nats, with its standard error."""
    rng = np.random.default_rng(seed)
    points, others = target.draw(rng, NUM_POINTS), target.draw(rng, NUM_POINTS)
    fitted = array_rivals.fit(method, setting, points, None, seconds, seed)
    excess = target.log_prob(others) - fitted.log_prob(others, None)
    return {
        "nats": round(float(excess.mean()), 5),
        "standard_error": round(float(excess.std() / np.sqrt(NUM_POINTS)), 5),
    } | fitted.figures


if __name__ == "__main__":
    measures = {name: functools.partial(measure, target) for name, target in TARGETS.items()}
    array_rivals.run(__doc__ or "", measures, "docs/results/arrays.jsonl", 60.0, 3)
