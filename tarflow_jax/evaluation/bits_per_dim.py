"""Bits per dimension of 8-bit images, under uniform dequantisation."""

import dataclasses
from typing import Any

import jax
import numpy as np

from tarflow_jax.evaluation.split import noisy_log_prob
from tarflow_jax.flow import TarFlowConfig
from tarflow_jax.likelihood import bits_per_dim
from tarflow_jax.noise import Noise
from tarflow_jax.runtime import BatchRunner, LazyRows


@dataclasses.dataclass(frozen=True)
class BitsPerDim:
    """Mean over images, and the standard error of that mean."""

    mean: float
    standard_error: float
    num_images: int

    @classmethod
    def of(cls, bits: np.ndarray) -> "BitsPerDim":
        """From each image's, [N]."""
        return cls(float(bits.mean()), float(bits.std(ddof=1) / np.sqrt(len(bits))), len(bits))


def image_bits_per_dim(
    runner: BatchRunner,
    config: TarFlowConfig,
    variables: dict[str, Any],
    images: LazyRows | tuple[Any, Any],
    key: jax.Array,
    num_draws: int = 1,
    levels: np.ndarray | None = None,
) -> np.ndarray:
    """Each image's, float64 [N]: an upper bound in expectation over the noise, computed in float32.

    Args:
      images: as of `noisy_log_prob`.
      key: draw k of the noise has the key fold_in(key, k), and of that each image its own, see `noisy_log_prob`.
      levels: as of `noisy_log_prob`.
      num_draws: K of the importance-weighted bound log 1/K Σ p(x + u_k); 1 is the paper's protocol.
    """
    keys = [jax.random.fold_in(key, draw) for draw in range(num_draws)]
    draws = [noisy_log_prob(runner, config, variables, images, Noise("uniform"), key, levels) for key in keys]
    log_probs = np.logaddexp.reduce(np.asarray(draws, np.float64), axis=0) - np.log(num_draws)
    return bits_per_dim(log_probs, config.num_dims)
