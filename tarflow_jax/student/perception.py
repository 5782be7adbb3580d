"""Perceptual distance between images, by a small classifier of the data set's classes.

A student may learn by it. It measures nothing: the classifier of `launch.evaluate` has another architecture and seed.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

_WIDTHS = (24, 48, 96)
_SMALL = 1e-4


class Seen(NamedTuple):
    """The classifier's features and logits."""

    scales: list[jax.Array]  # float32 [B, H, W, C], from the finest to the coarsest
    logits: jax.Array  # [B, num_classes]


class Perception(nn.Module):
    """Three pairs of convolutions over images [B, H, W, K], float32 in [-1, 1] or uint8."""

    num_classes: int

    @nn.compact
    def __call__(self, images: jax.Array) -> Seen:
        x, scales = images if images.dtype == jnp.float32 else images.astype(jnp.float32) / 127.5 - 1.0, []
        for width in _WIDTHS:
            for _ in range(2):
                x = nn.gelu(nn.Conv(width, (3, 3))(x))
            scales.append(x)
            x = nn.pool(x, 0.0, jax.lax.add, (2, 2), (2, 2), "VALID") / 4.0
        return Seen(scales, nn.Dense(self.num_classes)(x.mean((1, 2))))


def perceptual_distance(num_classes: int, params: Any, images: jax.Array, others: jax.Array) -> jax.Array:
    """Returns the squared distance [B] between normalized features, the mean over positions and scales.

    This is LPIPS (arXiv 1801.03924) without learned weights.
    """
    network = Perception(num_classes)
    pairs = zip(*(network.apply({"params": params}, x).scales for x in (images, others)), strict=True)
    errors = [jnp.square(_direction(a) - _direction(b)).sum(3).mean((1, 2)) for a, b in pairs]
    return jnp.stack(errors).mean(0)


def _direction(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.square(x).sum(3, keepdims=True) + _SMALL)
