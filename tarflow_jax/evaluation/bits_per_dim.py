"""Bits per dimension of a split."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tarflow_jax.data import ImageSource
from tarflow_jax.evaluation.split import split_log_prob
from tarflow_jax.flow import TarFlow
from tarflow_jax.likelihood import bits_per_dim
from tarflow_jax.noise import Noise


@dataclasses.dataclass(frozen=True)
class BitsPerDim:
    """Mean over the images of a split, and the standard error of that mean."""

    mean: float
    standard_error: float
    num_images: int


def evaluate_bits_per_dim(
    flow: TarFlow,
    variables: dict[str, Any],
    source: ImageSource,
    key: jax.Array,
    *,
    batch_size: int,
    mesh: Mesh,
    num_samples: int = 1,
) -> BitsPerDim:
    """Bits per dimension of the 8-bit images under uniform dequantisation, float32 at full precision.

    Args:
      num_samples: K of the importance-weighted bound log 1/K Σ p(x + u_k); 1 is the paper's protocol.
      (others): see `split_log_prob`.
    """
    flow = TarFlow(dataclasses.replace(flow.config, dtype="float32"))
    draws = [
        split_log_prob(flow, variables, source, Noise("uniform"), draw_key, batch_size=batch_size, mesh=mesh).astype(
            np.float64
        )
        for draw_key in jax.random.split(key, num_samples)
    ]
    log_probs = np.logaddexp.reduce(draws, axis=0) - np.log(num_samples)
    bits = np.asarray(bits_per_dim(log_probs, flow.config.num_dims), np.float64)
    return BitsPerDim(float(bits.mean()), float(bits.std(ddof=1) / np.sqrt(len(bits))), len(bits))
