"""Importance sampling of an unnormalised density, with a flow as the proposal."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tarflow_jax.errors import UserError
from tarflow_jax.pipeline import TarFlowPipeline


@dataclasses.dataclass(frozen=True)
class Weighted:
    """S samples x of a flow q with importance weights w = p̃(x) / q(x)."""

    x: jax.Array  # float32 [S, …]
    log_q: jax.Array  # float32 [S], nats
    log_weights: jax.Array  # float32 [S], -inf where p̃ is 0

    @property
    def effective_sample_size(self) -> float:
        """(Σ w)² / Σ w², from 1 to S."""
        weights = np.exp(np.asarray(self.log_weights, np.float64) - self.log_weights.max())
        return float(weights.sum() ** 2 / np.square(weights).sum())

    @property
    def log_z(self) -> float:
        """log mean w, an estimate of log ∫ p̃(x) dx."""
        log_weights = np.asarray(self.log_weights, np.float64)
        return float(log_weights.max() + np.log(np.exp(log_weights - log_weights.max()).mean()))

    def resampled(self, key: jax.Array, count: int) -> jax.Array:
        """Draws `count` samples in proportion to their weights, with replacement: float32 [count, …]."""
        return self.x[jax.random.categorical(key, self.log_weights, shape=(count,))]


def importance(
    flow: TarFlowPipeline, log_density: Callable[[jax.Array], Any], key: jax.Array, num_samples: int, **options: Any
) -> Weighted:
    """Draws samples from a flow and computes their importance weights under an unnormalised density.

    Args:
      flow: the proposal.
      log_density: log p̃ of x [S, …], in the flow's units, as an array [S]; -inf where p̃ is 0.
      key: for the samples.
      num_samples: S.
      options: of `TarFlowPipeline.sample`, such as condition and mask.

    Raises:
      ValueError: log_density returns another shape, NaN, +inf, or -inf for every sample.
    """
    x, log_q = flow.sample(key, num_samples, denoise=False, return_log_prob=True, **options)
    log_p = jnp.asarray(log_density(x), jnp.float32)
    if log_p.shape != (num_samples,):
        raise UserError(f"log_density returned shape {list(log_p.shape)}; expected [{num_samples}]")
    if (wrong := np.flatnonzero(np.isnan(log_p) | np.isposinf(log_p))).size:
        raise UserError(f"log_density is {log_p[wrong[0]]} for sample {wrong[0]}; expected a number or -inf")
    if np.isneginf(log_p).all():
        raise UserError("log_density is -inf for every sample; the flow does not reach where the density is")
    return Weighted(x, log_q, log_p - log_q)
