"""The sequential inverse of a block: token after token, with a key/value cache."""

import jax
import jax.numpy as jnp

from tarflow_jax.sampling.guidance import GuidedBlock


def invert_sequentially(block: GuidedBlock, z: jax.Array) -> jax.Array:
    """x_i = z_i exp(log_scale_i) + shift_i, for z and x [B, T, D] in block order.

    One compiled loop. The first token is its own inverse; the step at token i makes token i + 1.
    """
    batch_size, num_tokens, _ = z.shape
    if num_tokens == 1:
        return z

    def step(i: jax.Array, carry: tuple) -> tuple:
        x, caches = carry
        affine, caches = block(jax.lax.dynamic_slice_in_dim(x, i, 1, axis=1), caches, i)
        z_next = jax.lax.dynamic_slice_in_dim(z, i + 1, 1, axis=1)
        x_next = z_next * jnp.exp(affine.log_scale) + affine.shift
        return jax.lax.dynamic_update_slice_in_dim(x, x_next, i + 1, axis=1), caches

    x, _ = jax.lax.fori_loop(0, num_tokens - 1, step, (z, block.caches(batch_size, num_tokens - 1)))
    return x
