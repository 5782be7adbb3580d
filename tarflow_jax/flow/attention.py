"""Attention in plain JAX, for every device and differentiable in every mode."""

import jax
import jax.numpy as jnp

# Finite, because a fully masked row must give 0 * finite, never NaN, in the backward pass.
_MASKED = -1e30


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, start: jax.Array | int = 0, temperature: jax.Array | None = None
) -> jax.Array:
    """Computes softmax(q kᵀ / (temperature √H)) v, where query s sees the keys at positions <= start + s.

    Args:
      query: [B, N, S, H], at positions start .. start + S - 1.
      key, value: [B, N, R, H], at positions 0 .. R - 1.
      start: position of the first query.
      temperature: [B], divides the logits of each example (attention-temperature guidance), or None for 1.

    Returns [B, N, S, H], in the dtype of `query`. Logits and softmax are float32.
    """
    scale = jnp.full((query.shape[0],), query.shape[-1] ** -0.5, jnp.float32)
    if temperature is not None:
        scale = scale / temperature
    logits = jnp.einsum("BNSH,BNRH->BNSR", query, key, preferred_element_type=jnp.float32)
    logits = logits * scale[:, None, None, None]
    visible = jnp.arange(key.shape[2])[None, :] <= start + jnp.arange(query.shape[2])[:, None]  # [S, R]
    logits = jnp.where(visible[None, None], logits, _MASKED)
    weights = jax.nn.softmax(logits, axis=-1).astype(query.dtype)
    return jnp.einsum("BNSR,BNRH->BNSH", weights, value)


def attend_whole(query: jax.Array, key: jax.Array, value: jax.Array, causal: bool) -> jax.Array:
    """Attends over a whole sequence of queries, keys and values, each [B, N, T, H].

    Without `causal`, every query sees every key.
    """
    return attend(query, key, value, start=0 if causal else key.shape[2])
