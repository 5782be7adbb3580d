"""Denoising by Tweedie's formula, the score by `jax.grad` of the log-likelihood (section 3.3 of the paper)."""

from typing import Any

import jax
import jax.numpy as jnp

from tarflow_jax.flow import TarFlow
from tarflow_jax.likelihood import log_prob, unit_prior


def denoise(
    flow: TarFlow,
    variables: dict[str, Any],
    images: jax.Array,
    labels: jax.Array | None,
    noise_std: jax.Array | float,
    multiplier: jax.Array | float = 1.0,
) -> jax.Array:
    """x̂ = y + s σ² ∇_y log p(y), the posterior mean of a clean image given a noisy one (equation 8 of the paper).

    Args:
      images: noisy images y, float32 [B, H, W, K].
      labels: int32 [B], -1 for no class, or None.
      noise_std: σ, in [-1, 1] units, a scalar or [B].
      multiplier: s; 1 is the theory.

    Returns float32 [B, H, W, K]. In VP mode log p is the density that the blocks were trained on (`unit_prior`), as in
    the reference.
    """
    variables = unit_prior(variables)
    # The examples are independent, so the gradient of the summed log-likelihood holds each one's own score.
    levels = jnp.broadcast_to(jnp.asarray(noise_std, jnp.float32), images.shape[:1])
    score = jax.grad(lambda y: log_prob(flow, variables, y, labels, levels).sum())(images)
    return images + multiplier * jnp.square(levels)[:, None, None, None] * score
