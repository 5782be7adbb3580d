"""Means and covariances of features, and the Fréchet distance between them: float64, on the host."""

import dataclasses

import numpy as np
import scipy.linalg

from tarflow_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class FeatureStatistics:
    """Mean [D] and covariance [D, D] (divided by count - 1, as `np.cov` does) of features, float64.

    Raises ValueError for shapes that do not fit each other, or numbers that are not finite.
    """

    mean: np.ndarray
    covariance: np.ndarray

    def __post_init__(self) -> None:
        (size,) = self.mean.shape if self.mean.ndim == 1 else (0,)
        if not size or self.covariance.shape != (size, size):
            raise UserError(
                f"feature statistics have a mean of shape {list(self.mean.shape)} and a covariance of shape "
                f"{list(self.covariance.shape)}; expected [D] and [D, D]"
            )
        if not (np.isfinite(self.mean).all() and np.isfinite(self.covariance).all()):
            raise UserError("feature statistics hold numbers that are not finite")


class RunningStatistics:
    """Mean and covariance of a stream of features, in one pass (Chan, Golub and LeVeque's update)."""

    def __init__(self) -> None:
        self.count, self.mean, self.scatter = 0, np.zeros(()), np.zeros(())

    def add(self, features: np.ndarray) -> "RunningStatistics":
        """Takes features [N, D] of any float type; returns itself."""
        batch = np.asarray(features, np.float64)
        mean = batch.mean(0)
        centred = batch - mean
        total = self.count + len(batch)
        shift = mean - self.mean
        self.scatter = self.scatter + centred.T @ centred + np.outer(shift, shift) * (self.count * len(batch) / total)
        self.mean = self.mean + shift * (len(batch) / total)
        self.count = total
        return self

    def result(self) -> FeatureStatistics:
        """Raises ValueError when fewer than two samples were added."""
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 samples, got {self.count}")
        return FeatureStatistics(self.mean, self.scatter / (self.count - 1))


def feature_statistics(features: np.ndarray) -> FeatureStatistics:
    """Statistics of features [N, D] already in memory."""
    return RunningStatistics().add(features).result()


def _root(covariance: np.ndarray) -> np.ndarray:
    """A factor R [D, D] with R Rᵀ = covariance."""
    values, vectors = scipy.linalg.eigh(covariance)
    return vectors * np.sqrt(np.maximum(values, 0))


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """|m - m'|² + tr(C + C' - 2 (C C')^½) between Gaussians (Heusel et al. 2017).

    tr (C C')^½ is the sum of the singular values of Rᵀ R' with C = R Rᵀ, C' = R' R'ᵀ: real by construction,
    and without the offset on the diagonal that a matrix root needs when a covariance is singular. Raises ValueError if
    the two have different numbers of features: they are of different networks.
    """
    if first.mean.shape != second.mean.shape:
        raise UserError(
            f"statistics of {len(first.mean)} and of {len(second.mean)} features have no distance; "
            "were they taken with the same network?"
        )
    difference = first.mean - second.mean
    overlap = scipy.linalg.svdvals(_root(first.covariance).T @ _root(second.covariance)).sum()
    traces = np.trace(first.covariance) + np.trace(second.covariance)
    return float(difference @ difference + traces - 2 * overlap)
