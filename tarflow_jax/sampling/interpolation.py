"""Between two latents."""

import jax
import jax.numpy as jnp


def spherical(start: jax.Array, end: jax.Array, shares: jax.Array) -> jax.Array:
    """Spherical interpolation, (sin((1 - t) θ) a + sin(t θ) b) / sin θ with θ the angle between a and b.

    Standard normal latents have about the same norm, √(H W K), which points on a straight line between two of them have
    not: the flow has never seen such latents. Of parallel ones, where sin θ is 0, the line is taken.

    Args:
      start, end: latents a and b, float32 [H, W, K]. shares: t, float32 [N]; 0 is the start, 1 the end.

    Returns:
      float32 [N, H, W, K].
    """
    cosine = (start * end).sum() / (jnp.linalg.norm(start) * jnp.linalg.norm(end))
    angle = jnp.arccos(jnp.clip(cosine, -1, 1))
    parallel = jnp.sin(angle) < 1e-4
    sine = jnp.where(parallel, 1, jnp.sin(angle))
    of_start = jnp.where(parallel, 1 - shares, jnp.sin((1 - shares) * angle) / sine)
    of_end = jnp.where(parallel, shares, jnp.sin(shares * angle) / sine)
    of_both = jnp.stack([of_start, of_end], axis=1)  # [N, 2]
    return jnp.einsum("NE,EHWK->NHWK", of_both, jnp.stack([start, end]), precision="highest")
