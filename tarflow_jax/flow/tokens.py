"""Converts images and sequences to tokens and back, and orders tokens for a block.

Tokens of an image are row-major; the values inside a token are ordered (row, column, channel). Sequences are tokens.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tarflow_jax.flow.config import TarFlowConfig


def to_tokens(config: TarFlowConfig, data: jax.Array) -> jax.Array:
    """Cuts images [B, H, W, K] into tokens [B, T, D]; sequences [B, T, D] or [B, T] are tokens already."""
    if config.is_sequence:
        return data.reshape(-1, config.num_tokens, config.token_dim)
    return fold(data, config.patch_size).reshape(-1, config.num_tokens, config.token_dim)


def from_tokens(config: TarFlowConfig, tokens: jax.Array) -> jax.Array:
    """Inverts `to_tokens`."""
    if config.is_sequence:
        return tokens.reshape(-1, *config.data_shape)
    return unfold(tokens.reshape(-1, *config.grid, config.token_dim), config.patch_size)


def fold(images: jax.Array, patch: int) -> jax.Array:
    """Turns squares of P x P pixels into channels: [B, H, W, K] to [B, H / P, W / P, P² K]."""
    batch, height, width, channels = images.shape
    x = images.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return x.swapaxes(2, 3).reshape(batch, height // patch, width // patch, patch**2 * channels)


def unfold(x: jax.Array, patch: int) -> jax.Array:
    """Inverts `fold`."""
    batch, rows, columns, size = x.shape
    x = x.reshape(batch, rows, columns, patch, patch, size // patch**2)
    return x.swapaxes(2, 3).reshape(batch, rows * patch, columns * patch, size // patch**2)


def random_orders(config: TarFlowConfig) -> np.ndarray:
    """Draws a random order of the tokens for each block, [F, T]; float32, as all variables are."""
    rng = np.random.default_rng(0)
    return np.stack([rng.permutation(config.num_tokens) for _ in range(config.num_blocks)]).astype(np.float32)


def block_orders(config: TarFlowConfig, variables: Mapping[str, Any]) -> jax.Array | np.ndarray:
    """Returns the order in which each block reads the tokens, int32 [F, T]; by default odd blocks read backwards."""
    if config.random_orders:
        return variables["constants"]["orders"].astype(jnp.int32)
    forwards = np.arange(config.num_tokens, dtype=np.int32)
    backwards = 0 if config.orders == "backwards_first" else 1
    return np.stack([forwards[:: -1 if k % 2 == backwards else 1] for k in range(config.num_blocks)])


def order_within(order: jax.Array | np.ndarray, lengths: jax.Array | None) -> jax.Array | np.ndarray:
    """Moves the padding of sequences of `lengths` [B] to the end of an order [T].

    There it needs no mask in causal attention. Returns int32 [B, T], or [1, T] if `lengths` is None.
    """
    if lengths is None:
        return order[None]
    behind = jnp.asarray(order)[None] >= lengths[:, None]  # [B, T]
    return jnp.asarray(order)[jnp.argsort(behind, axis=1, stable=True)]


def without_padding(tokens: jax.Array, lengths: jax.Array | None) -> jax.Array:
    """Zeroes the padding of sequences [B, T, …] of `lengths` [B], in data order; None without padding."""
    if lengths is None:
        return tokens
    exists = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
    return jnp.where(exists.reshape(*exists.shape, *(1,) * (tokens.ndim - 2)), tokens, 0.0)


def permute(tokens: jax.Array, order: jax.Array | np.ndarray) -> jax.Array:
    """Reorders tokens [B, T, …] from data order to the order [1 or B, T] of a block."""
    if len(order) == 1:
        return jnp.take(tokens, order[0], axis=1, unique_indices=True, mode="clip")
    order = order.reshape(*order.shape, *(1,) * (tokens.ndim - 2))
    return jnp.take_along_axis(tokens, order, axis=1, mode="clip")


def unpermute(tokens: jax.Array, order: jax.Array | np.ndarray) -> jax.Array:
    """Inverts `permute`."""
    return permute(tokens, jnp.argsort(order, axis=1) if isinstance(order, jax.Array) else np.argsort(order, axis=1))
