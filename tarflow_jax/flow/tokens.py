"""Images <-> tokens, and the order in which a block reads them.

Tokens are row-major; the numbers inside a token are ordered (row, column, channel).
"""

import jax
import jax.numpy as jnp

from tarflow_jax.flow.config import TarFlowConfig


def to_tokens(config: TarFlowConfig, images: jax.Array) -> jax.Array:
    """Cuts images [B, H, W, K] into tokens [B, T, D]."""
    (height, width), patch = config.image_size, config.patch_size
    x = images.reshape(-1, height // patch, patch, width // patch, patch, config.image_channels)
    x = x.swapaxes(2, 3)  # [B, rows, columns, P, P, K]
    return x.reshape(-1, config.num_tokens, config.token_dim)


def to_images(config: TarFlowConfig, tokens: jax.Array) -> jax.Array:
    """Joins tokens [B, T, D] into images [B, H, W, K]; the inverse of `to_tokens`."""
    (height, width), patch = config.image_size, config.patch_size
    x = tokens.reshape(-1, height // patch, width // patch, patch, patch, config.image_channels)
    x = x.swapaxes(2, 3)  # [B, rows, P, columns, P, K]
    return x.reshape(-1, height, width, config.image_channels)


def is_reversed(block: int) -> bool:
    """Whether a block reads the tokens last to first: odd blocks do."""
    return block % 2 == 1


def permute(tokens: jax.Array, reverse: bool | jax.Array) -> jax.Array:
    """Reverses tokens [B, T, D] if `reverse`, a bool or a traced one; its own inverse."""
    if isinstance(reverse, bool):
        return jnp.flip(tokens, 1) if reverse else tokens
    return jnp.where(reverse, jnp.flip(tokens, 1), tokens)
