"""Posteriors of simulators: two moons and SLCP of the SBI benchmark (arXiv 2101.04653), against a spline flow.

    python -m benchmarks.posteriors [--names two_moons,slcp] [--seconds 60] [--seeds 3]

Fits each method to parameters given observations, tuned as in benchmarks/arrays.py, and samples it at three
observations. C2ST is the accuracy of a classifier (two hidden layers, five folds) that separates these samples from as
many of a reference posterior; 0.5 is best. The reference is exact for two moons, and sequential Monte Carlo with the
likelihood for SLCP. Rows go to docs/results/posteriors.jsonl.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import cross_val_score
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks import array_rivals

NUM_SIMULATIONS = 10_000
NUM_DRAWS = 5000
OBSERVATIONS = 3
METHODS = ("tarflow_jax", "flowjax coupling", "zuko spline")


class Simulator(NamedTuple):
    """A uniform prior on a box, a simulator, and its posterior."""

    bound: float  # parameters are uniform in ± this
    num_parameters: int
    simulate: Callable[[np.random.Generator, np.ndarray], np.ndarray]  # parameters [N, P] -> observations [N, C]
    posterior: Callable[[np.random.Generator, np.ndarray, int], np.ndarray]  # observation [C], count -> [count, P]

    def prior(self, rng: np.random.Generator, count: int) -> np.ndarray:
        return rng.uniform(-self.bound, self.bound, (count, self.num_parameters))

    def unbounded(self, parameters: np.ndarray) -> np.ndarray:
        """The logit of a parameter's place in the box: flows have no edges."""
        return np.log((self.bound + parameters) / (self.bound - parameters))

    def bounded(self, u: np.ndarray) -> np.ndarray:
        """The inverse of `unbounded`."""
        return self.bound * np.tanh(u / 2)


def crescent(rng: np.random.Generator, count: int) -> np.ndarray:
    """Points of a noisy half circle, [count, 2]."""
    angles, radii = rng.uniform(-np.pi / 2, np.pi / 2, count), rng.normal(0.1, 0.01, count)
    return np.stack([radii * np.cos(angles) + 0.25, radii * np.sin(angles)], axis=1)


def simulate_two_moons(rng: np.random.Generator, parameters: np.ndarray) -> np.ndarray:
    """A crescent, moved by |θ₀ + θ₁| and θ₁ - θ₀."""
    total, difference = parameters.sum(1), parameters[:, 1] - parameters[:, 0]
    return crescent(rng, len(parameters)) + np.stack([-np.abs(total), difference], axis=1) / np.sqrt(2)


def two_moons_posterior(rng: np.random.Generator, observation: np.ndarray, count: int) -> np.ndarray:
    """Exact: a point of the crescent gives the parameters but for the sign of their sum; the box refuses the rest."""
    found = np.zeros((0, 2))
    while len(found) < count:
        moved = (observation - crescent(rng, count)) * np.sqrt(2)
        moved = moved[moved[:, 0] <= 0]
        total = moved[:, 0] * rng.choice([-1, 1], len(moved))
        drawn = np.stack([total - moved[:, 1], total + moved[:, 1]], axis=1) / 2
        found = np.concatenate([found, drawn[np.abs(drawn).max(1) <= 1]])
    return found[:count]


def slcp_factors(parameters: np.ndarray) -> tuple[np.ndarray, ...]:
    """Standard deviations and correlation of the Gaussian of four points."""
    return np.square(parameters[:, 2]), np.square(parameters[:, 3]), np.tanh(parameters[:, 4])


def simulate_slcp(rng: np.random.Generator, parameters: np.ndarray) -> np.ndarray:
    """Four points of a Gaussian in two dimensions, [N, 8]."""
    first, second, correlation = slcp_factors(parameters)
    noise = rng.normal(size=(4, 2, len(parameters)))
    x = parameters[:, 0] + first * noise[:, 0]
    y = parameters[:, 1] + second * (correlation * noise[:, 0] + np.sqrt(1 - correlation**2) * noise[:, 1])
    return np.stack([x, y], axis=1).reshape(8, -1).T


def slcp_log_likelihood(parameters: np.ndarray, observation: np.ndarray) -> np.ndarray:
    """log p of an observation [8] given parameters [N, 5], but for a constant."""
    first, second, correlation = (factor[:, None] for factor in slcp_factors(parameters))
    points = observation.reshape(4, 2)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        u = (points[:, 0] - parameters[:, :1]) / first
        v = ((points[:, 1] - parameters[:, 1:2]) / second - correlation * u) / np.sqrt(1 - correlation**2)
        log_prob = -0.5 * (u**2 + v**2) - np.log(first) - np.log(second) - 0.5 * np.log(1 - correlation**2)
    return np.nan_to_num(log_prob.sum(1), nan=-np.inf)


def slcp_posterior(rng: np.random.Generator, observation: np.ndarray, count: int) -> np.ndarray:
    """Sequential Monte Carlo from the prior: 100,000 particles, tempered to half of them each time, moved ten times.

    Moves are steps along the difference of two others (half of them with θ₂ and θ₃'s signs drawn anew, which the
    likelihood does not see).
    """
    particles, power, size = rng.uniform(-3, 3, (100_000, 5)), 0.0, 100_000
    log_p = slcp_log_likelihood(particles, observation)
    while power < 1:
        low, high = power, 1.0
        for _ in range(40):  # the power at which half of the particles count
            middle = (low + high) / 2
            weights = np.exp((middle - power) * (log_p - log_p.max()))
            low, high = (middle, high) if weights.sum() ** 2 / np.square(weights).sum() > size / 2 else (low, middle)
        weights = np.exp((high - power) * (log_p - log_p.max()))
        power = high if high < 1 - 1e-6 else 1.0
        chosen = rng.choice(size, size, p=weights / weights.sum())
        particles, log_p = particles[chosen], log_p[chosen]
        for _ in range(10 if power < 1 else 200):
            a, b = rng.permutation(size), rng.permutation(size)
            scale = rng.choice([0.1, 0.3, 0.8], (size, 1))
            moved = particles + scale * (particles[a] - particles[b]) + 1e-4 * rng.normal(size=(size, 5))
            moved[:, 2:4] *= np.where(rng.random((size, 1)) < 0.5, rng.choice([-1, 1], (size, 2)), 1)
            moved_log_p = np.where(np.abs(moved).max(1) <= 3, slcp_log_likelihood(moved, observation), -np.inf)
            accepted = np.log(rng.random(size)) < power * (moved_log_p - log_p)
            particles, log_p = np.where(accepted[:, None], moved, particles), np.where(accepted, moved_log_p, log_p)
    return rng.permutation(particles)[:count]


TASKS = {
    "two_moons": Simulator(1.0, 2, simulate_two_moons, two_moons_posterior),
    "slcp": Simulator(3.0, 5, simulate_slcp, slcp_posterior),
}


def c2st(a: np.ndarray, b: np.ndarray) -> float:
    """Accuracy of a classifier that tells a [N, P] from b [N, P], over five folds."""
    width = 10 * a.shape[1]
    network = MLPClassifier((width, width), max_iter=1000, random_state=0)
    x, y = np.concatenate([a, b]), np.repeat([0, 1], [len(a), len(b)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        shuffled = np.random.default_rng(0).permutation(len(x))
        return float(cross_val_score(make_pipeline(StandardScaler(), network), x[shuffled], y[shuffled], cv=5).mean())


@functools.cache
def references(task: Simulator) -> list[tuple[np.ndarray, np.ndarray]]:
    """Observations [C], the same for all methods, and draws of their posteriors [NUM_DRAWS, P]."""
    rng = np.random.default_rng(1000)
    observations = task.simulate(rng, task.prior(rng, OBSERVATIONS))
    return [(observed, task.posterior(rng, observed, NUM_DRAWS)) for observed in observations]


def measure(task: Simulator, method: str, setting: dict[str, Any], seconds: float, seed: int) -> dict[str, object]:
    """Fits a method, and compares its posteriors with the references unless it is being tuned."""
    rng = np.random.default_rng(seed)
    parameters = task.prior(rng, NUM_SIMULATIONS)
    observations = task.simulate(rng, parameters)
    fitted = array_rivals.fit(method, setting, task.unbounded(parameters), observations, seconds, seed)
    if seed == array_rivals.TUNING_SEED:
        return fitted.figures
    accuracies = []
    for observed, reference in references(task):
        drawn = task.bounded(fitted.sample(seed, np.repeat(observed[None], NUM_DRAWS, 0)))
        accuracies.append(round(c2st(reference, drawn), 4))
    return fitted.figures | {"c2st": accuracies}


if __name__ == "__main__":
    measures = {name: functools.partial(measure, task) for name, task in TASKS.items()}
    array_rivals.run(__doc__ or "", measures, "docs/results/posteriors.jsonl", 60.0, 3, METHODS)
