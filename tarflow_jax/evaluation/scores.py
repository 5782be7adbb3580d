"""Scores of feature sets besides the Fréchet distance, each as torch-fidelity computes it; float64, on the host.

The random orders are NumPy's legacy generator with seed 2020, because torch-fidelity's are: the scores then agree to
rounding, not only on average.
"""

import numpy as np
import scipy.special
from sklearn.metrics import pairwise_distances_chunked
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.neighbors import NearestNeighbors

from tarflow_jax.errors import UserError
from tarflow_jax.runtime import progress

SEED = 2020


def inception_score(logits: np.ndarray, splits: int = 10) -> tuple[float, float]:
    """exp E KL(p(y|x) || p(y)) from logits [N, C] (without the bias); mean and standard deviation over the splits.

    Salimans et al. 2016. The images are shuffled first: published scores of sorted samples differ in the last digits.
    """
    order = np.random.RandomState(SEED).permutation(len(logits))
    log_posterior = scipy.special.log_softmax(np.asarray(logits, np.float64)[order], axis=1)
    scores = []
    for i in range(splits):
        part = log_posterior[i * len(logits) // splits : (i + 1) * len(logits) // splits]
        posterior = np.exp(part)
        divergence = (posterior * (part - np.log(posterior.mean(0)))).sum(1).mean()
        scores.append(np.exp(divergence))
    return float(np.mean(scores)), float(np.std(scores))


def kernel_distance(
    first: np.ndarray, second: np.ndarray, subsets: int = 100, subset_size: int = 1000
) -> tuple[float, float]:
    """Squared maximum mean discrepancy with kernel (x·y / D + 1)³: mean and standard deviation over random subsets.

    Features are [N, D] and [M, D]. With Inception's pool_3 this is KID (Bińkowski et al. 2018), unbiased at any number
    of samples. Raises ValueError when a set is smaller than a subset.
    """
    if min(len(first), len(second)) < subset_size:
        raise UserError(f"kernel distance takes subsets of {subset_size} images, got {len(first)} and {len(second)}")
    random = np.random.RandomState(SEED)
    distances = []
    for _ in progress(range(subsets), "kernel distance"):
        x = first[random.choice(len(first), subset_size, replace=False)].astype(np.float64)
        y = second[random.choice(len(second), subset_size, replace=False)].astype(np.float64)
        within = _mean_off_diagonal(polynomial_kernel(x, x)) + _mean_off_diagonal(polynomial_kernel(y, y))
        distances.append(within - 2 * polynomial_kernel(x, y).mean())
    return float(np.mean(distances)), float(np.std(distances))


def _mean_off_diagonal(kernel: np.ndarray) -> float:
    return float((kernel.sum() - np.trace(kernel)) / (kernel.size - len(kernel)))


def precision_recall(generated: np.ndarray, real: np.ndarray, neighbours: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019) of features [N, D] and [M, D].

    Precision is the fraction of generated images inside a ball of the real set: around every real image, as
    wide as the distance to its k-th neighbour in that set. Recall exchanges the roles. Raises ValueError
    when a set has no k-th neighbour.
    """
    if min(len(generated), len(real)) <= neighbours:
        raise UserError(f"precision and recall need more than {neighbours} images in each set")
    # One common shift changes no distance and keeps the digits that |x|² - 2 x·y + |y|² would cancel.
    centre = np.mean(real, axis=0, dtype=np.float64)
    generated, real = generated - centre, real - centre
    return _fraction_inside(generated, real, neighbours), _fraction_inside(real, generated, neighbours)


def _fraction_inside(points: np.ndarray, centres: np.ndarray, neighbours: int) -> float:
    distances, _ = NearestNeighbors(n_neighbors=neighbours, algorithm="brute").fit(centres).kneighbors()  # not itself
    radius = distances[:, -1]
    chunks = pairwise_distances_chunked(points, centres)  # at 50,000 images the whole matrix would take 20 GB
    return float(np.concatenate([(distances <= radius).any(1) for distances in chunks]).mean())
