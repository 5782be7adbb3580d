"""The stack of blocks, the units of the data, and the learned prior variance of volume-preserving (VP) mode."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tarflow_jax.flow.block import Affine, FlowBlock, Given
from tarflow_jax.flow.config import TarFlowConfig
from tarflow_jax.flow.tokens import block_orders, from_tokens, order_within, random_orders, to_tokens, without_padding
from tarflow_jax.flow.transformer import Kernels

PRIOR_RATE = 0.1


class TarFlow(nn.Module):
    """Maps images or sequences to latents ("Normalizing Flows are Capable Generative Models", arXiv 2412.06329).

    Variables: `params`; in VP mode `prior/variance` [T, D], a last, diagonal affine layer; and `constants`, which
    training does not change: `orders` [F, T] of the blocks if they are random; `mean` and `std` [T, D] of the training
    sequences; `condition_mean` and `condition_std` [C]; and `null_prefix` [L, C], which replaces a missing prefix.
    Sows `intermediates/input`, the tokens [B, T, D] before the first block, and `intermediates/block_outputs`, the
    tokens after each block.
    """

    config: TarFlowConfig
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(
        self,
        data: jax.Array,
        labels: jax.Array | None = None,
        noise_std: jax.Array | None = None,
        condition: jax.Array | None = None,
        lengths: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Encodes images or sequences.

        Args:
          data: float32, images [B, H, W, K] in [-1, 1] plus noise, or sequences [B, T, D] or [B, T] in their own units.
          labels: int32 [B], -1 for no class; None is all -1.
          noise_std: σ of each image's noise, float32 [B], for a noise-conditional flow.
          condition: float32 [B, C], [B, T, C] of kind "tokens", or [B, L, C] of kind "prefix". NaN marks a missing
            one; None is all NaN.
          lengths: sequence lengths, int32 [B]; what follows a sequence is ignored. None without padding.

        Returns (latents, log_det): float32, shaped as `data`, standard normal under the model, 0 in padding; and
        float32 [B] in nats, the log absolute determinant of the Jacobian d latents / d data.
        """
        config = self.config
        if config.random_orders:
            self.variable("constants", "orders", lambda: jnp.asarray(random_orders(config)))
        if config.is_sequence:
            for name, init in (("mean", jnp.zeros), ("std", jnp.ones)):
                self.variable("constants", name, init, (config.num_tokens, config.token_dim), jnp.float32)
        if config.has_prefix:
            self.variable("constants", "null_prefix", jnp.zeros, config.condition_shape, jnp.float32)
        if config.condition_in_units:
            for name, init in (("condition_mean", jnp.zeros), ("condition_std", jnp.ones)):
                self.variable("constants", name, init, config.condition_dim, jnp.float32)
        condition, _ = conditions(self.variables, condition, None, len(data))
        given = Given(labels, noise_std, condition, lengths)
        tokens = without_padding(to_tokens(config, data.astype(jnp.float32)), lengths)
        log_det = jnp.zeros(len(tokens), jnp.float32)
        if config.is_sequence:
            standardise = units(self.variables, given)
            tokens, log_det = standardise.forward(tokens), log_det + standardise.token_log_det.sum(1)
        self.sow("intermediates", "input", tokens)
        for k, order in enumerate(block_orders(config, self.variables)):
            block = FlowBlock(config, k, self.kernels, name=f"block_{k}")
            tokens, block_log_det = block(tokens, order_within(order, lengths), given)
            log_det = log_det + block_log_det
            self.sow("intermediates", "block_outputs", tokens)
        if config.volume_preserving:
            shape = (config.num_tokens, config.token_dim)
            variance = self.variable("prior", "variance", jnp.ones, shape, jnp.float32).value
            tokens = tokens * jax.lax.rsqrt(variance)[None]
            log_det = log_det - 0.5 * jnp.log(variance).sum()
        return from_tokens(config, tokens), log_det


def updated_prior(variance: jax.Array, block_output: jax.Array) -> jax.Array:
    """Updates the running mean of z² [T, D] with the last block's output [B, T, D] (VP mode)."""
    return variance + PRIOR_RATE * (jnp.square(block_output).mean(0) - variance)


def conditions(
    variables: Mapping[str, Any], condition: jax.Array | None, null_condition: jax.Array | None, batch_size: int
) -> tuple[jax.Array | None, jax.Array | None]:
    """Returns `Given.condition` and `Given.null_condition`: standardises vectors, fills in a missing prefix."""
    stored = variables.get("constants", {}).get("null_prefix")
    if stored is not None:
        stored = jnp.broadcast_to(stored[None], (batch_size, *stored.shape))
        condition = stored if condition is None else jnp.where(jnp.isnan(condition), stored, condition)
        return condition, stored if null_condition is None else null_condition
    if condition is None and null_condition is not None:
        condition = jnp.full_like(null_condition, jnp.nan)
    return standardised(variables, condition), standardised(variables, null_condition)


def standardised(variables: Mapping[str, Any], condition: jax.Array | None) -> jax.Array | None:
    """Subtracts a condition's mean and divides by its standard deviation."""
    if condition is None:
        return None
    shape = (1,) * (condition.ndim - 1) + (-1,)
    mean, std = (variables["constants"][f"condition_{name}"].reshape(shape) for name in ("mean", "std"))
    return (condition - mean) / std


def units(variables: Mapping[str, Any], given: Given) -> Affine:
    """Returns the map between sequences in their own units, x, and standardised ones, z; the identity in padding."""
    constants = variables["constants"]
    exists = given.exists(jnp.arange(len(constants["mean"])))
    return Affine(constants["std"][None], constants["mean"][None]).where(exists)
