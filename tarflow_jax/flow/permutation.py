"""The order in which a block reads the tokens. Each is its own inverse."""

import jax
import jax.numpy as jnp


def permute(tokens: jax.Array, block: int, axis: int = 1) -> jax.Array:
    """Orders tokens as block number `block` reads them: even blocks forwards, odd blocks backwards."""
    return jnp.flip(tokens, axis) if block % 2 else tokens
