"""Scores generated images by their features: Fréchet and kernel distance, inception score, precision and recall.

All are computed in float64 on the host. They use torch-fidelity's random generator and seed, to agree up to rounding.
"""

import dataclasses

import numpy as np
import scipy.linalg
import scipy.special
from sklearn.metrics import pairwise_distances_chunked
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.neighbors import NearestNeighbors

from tarflow_jax.errors import UserError
from tarflow_jax.runtime import progress

SEED = 2020  # of NumPy's legacy generator
NUM_SPLITS, SUBSET_SIZE, NEIGHBOURS = 10, 1000, 3  # as published


@dataclasses.dataclass(frozen=True)
class FeatureStatistics:
    """Mean [D] and covariance [D, D] (divided by count - 1) of features."""

    mean: np.ndarray
    covariance: np.ndarray

    def __post_init__(self) -> None:
        if not (np.isfinite(self.mean).all() and np.isfinite(self.covariance).all()):
            raise UserError("feature statistics hold numbers that are not finite")


class RunningStatistics:
    """Accumulates the mean and covariance of a stream of features in one pass."""

    def __init__(self) -> None:
        self.count, self.origin, self.total, self.scatter = 0, np.zeros(()), np.zeros(()), np.zeros(())

    def add(self, features: np.ndarray) -> "RunningStatistics":
        """Adds features [N, D]; returns itself."""
        if not self.count:
            self.origin = features.mean(0, dtype=np.float64)  # sums of squares around 0 would cancel
        centred = features - self.origin
        self.count += len(centred)
        self.total, self.scatter = self.total + centred.sum(0), self.scatter + centred.T @ centred
        return self

    def result(self) -> FeatureStatistics:
        """Returns the statistics so far."""
        mean = self.total / self.count
        covariance = (self.scatter - self.count * np.outer(mean, mean)) / (self.count - 1)
        return FeatureStatistics(self.origin + mean, covariance)


def feature_statistics(features: np.ndarray) -> FeatureStatistics:
    """Returns the statistics of features [N, D]; raises UserError for N < D, which leaves the covariance singular."""
    number, size = features.shape
    if number < size:
        raise UserError(f"a Fréchet distance of {size} features needs at least {size} images, got {number}")
    return RunningStatistics().add(features).result()


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """Returns |m - m'|² + tr(C + C' - 2 (C C')^½) between Gaussians (Heusel et al. 2017).

    tr (C C')^½ is the sum of the singular values of Rᵀ R' with C = R Rᵀ, C' = R' R'ᵀ. It is real by construction, and
    a singular covariance needs no diagonal offset. Raises UserError if the numbers of features differ.
    """
    if first.mean.shape != second.mean.shape:
        sizes = f"{len(first.mean)} and of {len(second.mean)}"
        raise UserError(f"statistics of {sizes} features have no distance; were they taken with the same network?")
    difference = first.mean - second.mean
    overlap = scipy.linalg.svdvals(_root(first.covariance).T @ _root(second.covariance)).sum()
    traces = np.trace(first.covariance) + np.trace(second.covariance)
    return float(difference @ difference + traces - 2 * overlap)


def _root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = scipy.linalg.eigh(covariance)
    return vectors * np.sqrt(np.maximum(values, 0))


def inception_score(logits: np.ndarray) -> tuple[float, float]:
    """Returns exp E KL(p(y|x) || p(y)) from logits [N, C] without the bias: mean and standard deviation over 10 splits.

    Salimans et al. 2016. Images are shuffled first, so scores published for sorted samples differ in the last digits.
    """
    order = np.random.RandomState(SEED).permutation(len(logits))
    log_posterior = scipy.special.log_softmax(np.asarray(logits, np.float64)[order], axis=1)
    scores = []
    for i in range(NUM_SPLITS):
        part = log_posterior[i * len(logits) // NUM_SPLITS : (i + 1) * len(logits) // NUM_SPLITS]
        posterior = np.exp(part)
        divergence = (posterior * (part - np.log(posterior.mean(0)))).sum(1).mean()
        scores.append(np.exp(divergence))
    return float(np.mean(scores)), float(np.std(scores))


def kernel_distance(
    first: np.ndarray, second: np.ndarray, subsets: int = 100, subset_size: int = SUBSET_SIZE
) -> tuple[float, float]:
    """Returns the squared MMD with kernel (x·y / D + 1)³: mean and standard deviation over random subsets.

    Features are [N, D] and [M, D]. With Inception's pool_3 this is KID (Bińkowski et al. 2018), unbiased at any number
    of samples. Raises ValueError if a set is smaller than a subset.
    """
    random = np.random.RandomState(SEED)
    distances = []
    for _ in progress(range(subsets), "kernel distance"):
        x = first[random.choice(len(first), subset_size, replace=False)].astype(np.float64)
        y = second[random.choice(len(second), subset_size, replace=False)].astype(np.float64)
        kernels = polynomial_kernel(x) + polynomial_kernel(y)
        within = (kernels.sum() - np.trace(kernels)) / (subset_size * (subset_size - 1))  # unbiased: no diagonals
        distances.append(within - 2 * polynomial_kernel(x, y).mean())
    return float(np.mean(distances)), float(np.std(distances))


def precision_recall(generated: np.ndarray, real: np.ndarray) -> tuple[float, float]:
    """Returns improved precision and recall (Kynkäänniemi et al. 2019) of features [N, D] and [M, D].

    Precision is the fraction of generated images that lie within the distance of some real image to its third
    nearest real neighbour. Recall swaps the two sets. Raises ValueError if a set has no third neighbour.
    """
    # Centring changes no distance, and avoids cancellation in |x|² - 2 x·y + |y|².
    centre = np.mean(real, axis=0, dtype=np.float64)
    generated, real = generated - centre, real - centre
    return _fraction_inside(generated, real), _fraction_inside(real, generated)


def _fraction_inside(points: np.ndarray, centres: np.ndarray) -> float:
    # Without arguments, kneighbors leaves each point out of its own neighbours.
    distances, _ = NearestNeighbors(n_neighbors=NEIGHBOURS, algorithm="brute").fit(centres).kneighbors()
    radius = distances[:, -1]
    chunks = pairwise_distances_chunked(points, centres)  # at 50,000 images the whole matrix would take 20 GB
    return float(np.concatenate([(distances <= radius).any(1) for distances in chunks]).mean())
