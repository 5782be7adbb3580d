"""What a density is conditioned on."""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp


class Conditioning(flax.struct.PyTreeNode):
    """What the density of a batch of B examples is conditioned on; a frozen JAX pytree. None is nothing.

    `TarFlowPipeline` makes one from a call's keywords and checks it there; everything below takes it as it is.
    """

    labels: jax.Array | None = None  # int32 [B], -1 for no class; None is all -1
    noise_std: jax.Array | None = None  # σ of a noise-conditional flow, float32 [B]
    condition: jax.Array | None = None  # float32 [B, C], [B, T, C] or a prefix [B, L, C]; NaN is a missing one
    lengths: jax.Array | None = None  # sequence lengths, int32 [B]; None without padding
    null_condition: jax.Array | None = None  # what guidance pushes away from, shaped as `condition`; None is all NaN

    def standardized(self, variables: Mapping[str, Any], batch_size: int) -> "Conditioning":
        """Subtracts the mean of vector conditions and divides by their std; fills in a missing prefix."""
        condition, null_condition, constants = self.condition, self.null_condition, variables.get("constants", {})
        if (stored := constants.get("null_prefix")) is not None:
            stored = jnp.broadcast_to(stored[None], (batch_size, *stored.shape))
            condition = stored if condition is None else jnp.where(jnp.isnan(condition), stored, condition)
            null_condition = stored if null_condition is None else null_condition
            return self.replace(condition=condition, null_condition=null_condition)
        if condition is None and null_condition is not None:
            condition = jnp.full_like(null_condition, jnp.nan)

        def standardize(x: jax.Array) -> jax.Array:
            shape = (1,) * (x.ndim - 1) + (-1,)
            mean, std = (constants[f"condition_{name}"].reshape(shape) for name in ("mean", "std"))
            return (x - mean) / std

        condition, null_condition = jax.tree.map(standardize, (condition, null_condition))
        return self.replace(condition=condition, null_condition=null_condition)

    def unconditional(self) -> "Conditioning":
        """Drops class and condition, for the unguided pass; noise level and lengths stay."""
        condition = self.null_condition
        if condition is None and self.condition is not None:
            condition = jnp.full_like(self.condition, jnp.nan)
        labels = None if self.labels is None else jnp.full_like(self.labels, -1)
        return self.replace(labels=labels, condition=condition)

    def exists(self, positions: jax.Array) -> jax.Array | None:
        """Returns whether positions [S] in block order hold tokens, not padding: bool [B, S], or None without it."""
        return None if self.lengths is None else positions[None] < self.lengths[:, None]


UNCONDITIONAL = Conditioning()
