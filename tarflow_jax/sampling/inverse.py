"""The sequential inverse of a block: token after token, with a key/value cache."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tarflow_jax.flow import grown
from tarflow_jax.sampling.guidance import GuidedBlock


def cache_growth(num_tokens: int) -> int:
    """Tokens that the cache grows by at a time, so that early tokens do not attend to room for late ones.

    Each length of the cache is compiled anew, so there are few: of eight, a token reads 1/8 more than it needs to.
    """
    return max(64, -(-num_tokens // 8))


class Inverted(NamedTuple):
    """A block's input and how it was found: x [B, T, D] in block order, int32 [B] updates, float32 [B] last change."""

    x: jax.Array
    iterations: jax.Array
    residual: jax.Array


def unchanged(z: jax.Array) -> Inverted:
    """The inverse in no updates, of a block of a single token."""
    return Inverted(z, jnp.zeros(len(z), jnp.int32), jnp.zeros(len(z), jnp.float32))


@dataclasses.dataclass(frozen=True)
class Sequential:
    """x_i = z_i exp(log_scale_i) + shift_i, token after token: exact, T - 1 steps of one token."""

    def invert(self, block: GuidedBlock, z: jax.Array) -> Inverted:
        """Inverts a block for z [B, T, D] in block order, in one compiled loop a segment.

        The first token is its own inverse; the step at token i makes token i + 1.
        """
        batch_size, num_tokens, _ = z.shape

        def step(i: jax.Array, carry: tuple) -> tuple:
            x, caches = carry
            inverse, caches = block(jax.lax.dynamic_slice_in_dim(x, i, 1, axis=1), caches, i)
            x_next = inverse(jax.lax.dynamic_slice_in_dim(z, i + 1, 1, axis=1))
            return jax.lax.dynamic_update_slice_in_dim(x, x_next, i + 1, axis=1), caches

        x, caches = z, block.caches(batch_size, 0)
        growth = cache_growth(num_tokens)
        for start in range(0, num_tokens - 1, growth):
            stop = min(start + growth, num_tokens - 1)
            x, caches = jax.lax.fori_loop(start, stop, step, (x, grown(caches, stop)))
        return unchanged(x)._replace(iterations=jnp.full((batch_size,), num_tokens - 1, jnp.int32))
