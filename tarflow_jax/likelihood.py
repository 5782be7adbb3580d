"""log p(x), the training loss, and bits per dimension."""

from typing import Any

import jax
import jax.numpy as jnp

from tarflow_jax.flow import TarFlow

LOG_2PI = 1.8378770664093453
LEVELS_PER_UNIT = 128  # half the 256 levels, because images span 2 units


def log_prob(flow: TarFlow, variables: dict[str, Any], images: jax.Array, labels: jax.Array | None = None) -> jax.Array:
    """log p(x) = Σ log N(latents; 0, 1) + log_det (equation 3 of the paper).

    Args:
      images: float32 [B, H, W, K]; labels: int32 [B], -1 for no class, or None.

    Returns:
      float32 [B], nats.
    """
    latents, log_det = flow.apply(variables, images, labels)
    energy = 0.5 * (jnp.square(latents) + LOG_2PI).sum((1, 2, 3))
    return log_det - energy


def training_loss(
    flow: TarFlow, variables: dict[str, Any], images: jax.Array, labels: jax.Array | None = None
) -> tuple[jax.Array, tuple[dict[str, jax.Array], jax.Array]]:
    """Mean over batch and dimensions of ½ z² - log_det / (T D): -log p in nats per dimension, less ½ log 2π.

    z is the last block's output; in VP mode, whose blocks have log_det 0, the prior variance plays no part in it.

    Args:
      images: noisy float32 [B, H, W, K]; labels: int32 [B], -1 for no class, or None.

    Returns:
      (loss, (metrics, z)): metrics are scalars and `block_norms` [F], the root mean square of each block's output;
      z [B, T, D] is what the VP prior learns from.
    """
    (_, log_det), sown = flow.apply(variables, images, labels, mutable=["intermediates"])
    outputs = sown["intermediates"]["block_outputs"]
    half_square = 0.5 * jnp.square(outputs[-1]).mean()
    log_det_per_dim = log_det.mean() / flow.config.num_dims
    if flow.config.volume_preserving:
        log_det_per_dim = jnp.zeros_like(log_det_per_dim)
    loss = half_square - log_det_per_dim
    metrics = {
        "loss": loss,
        "half_mean_z2": half_square,
        "log_det_per_dim": log_det_per_dim,
        "block_norms": jnp.stack([jnp.sqrt(jnp.square(x).mean()) for x in outputs]),
    }
    return loss, (metrics, outputs[-1])


def bits_per_dim(log_prob: jax.Array, num_dims: int) -> jax.Array:
    """(-log p(x) / (H W K) + log 128) / log 2: bits per dimension of 8-bit data, from nats [B]."""
    return (-log_prob / num_dims + jnp.log(LEVELS_PER_UNIT)) / jnp.log(2.0)
