"""The stack of blocks in both directions: `TarFlow`, data to latents, and `inverse`, latents to data.

Around the blocks are the standardization of sequences and the learned prior variance of volume-preserving (VP) mode.
"""

import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tarflow_jax.flow.block import Affine, FlowBlock
from tarflow_jax.flow.conditioning import UNCONDITIONAL, Conditioning
from tarflow_jax.flow.config import TarFlowConfig
from tarflow_jax.flow.inverse import BlockInverse, Inversion, invert
from tarflow_jax.flow.tokens import (
    block_orders,
    from_tokens,
    order_within,
    permute,
    random_orders,
    to_tokens,
    unpermute,
    without_padding,
)
from tarflow_jax.flow.transformer import Kernels, cast_kernels

InvertBlock = Callable[[Any, BlockInverse, jax.Array, jax.Array | None], Inversion]


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
    def __call__(self, data: jax.Array, conditioning: Conditioning = UNCONDITIONAL) -> tuple[jax.Array, jax.Array]:
        """Encodes images or sequences.

        Args:
          data: float32, images [B, H, W, K] in [-1, 1] plus noise, or sequences [B, T, D] or [B, T] in their own units.
          conditioning: what the density is conditioned on; a noise-conditional flow needs its `noise_std`. What follows
            a sequence of `lengths` is ignored.

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
        if config.standardizes_condition:
            for name, init in (("condition_mean", jnp.zeros), ("condition_std", jnp.ones)):
                self.variable("constants", name, init, config.condition_dim, jnp.float32)
        conditioning, lengths = conditioning.standardized(self.variables, len(data)), conditioning.lengths
        tokens = without_padding(to_tokens(config, data.astype(jnp.float32)), lengths)
        log_det = jnp.zeros(len(tokens), jnp.float32)
        if config.is_sequence:
            standardize = standardizer(self.variables, conditioning)
            tokens, log_det = standardize.forward(tokens), log_det + standardize.token_log_det.sum(1)
        self.sow("intermediates", "input", tokens)
        for k, order in enumerate(block_orders(config, self.variables)):
            block = FlowBlock(config, k, self.kernels, name=f"block_{k}")
            tokens, block_log_det = block(tokens, order_within(order, lengths), conditioning)
            log_det = log_det + block_log_det
            self.sow("intermediates", "block_outputs", tokens)
        if config.volume_preserving:
            shape = (config.num_tokens, config.token_dim)
            variance = self.variable("prior", "variance", jnp.ones, shape, jnp.float32).value
            tokens = tokens * jax.lax.rsqrt(variance)[None]
            log_det = log_det - 0.5 * jnp.log(variance).sum()
        return from_tokens(config, tokens), log_det


def inverse(
    flow: TarFlow,
    variables: Mapping[str, Any],
    latents: jax.Array,
    conditioning: Conditioning = UNCONDITIONAL,
    guesses: jax.Array | None = None,
    *,
    strategies: Sequence[Hashable] | None = None,
    invert_block: InvertBlock = lambda strategy, block, z, guess: invert(block, z),
) -> tuple[jax.Array, jax.Array, Inversion]:
    """Inverts `TarFlow`, last block to first, token by token unless another strategy is given.

    Consecutive blocks that differ only in parameters and order share one compiled loop, so that compile time does not
    grow with their number.

    Args:
      flow: static.
      variables: its variables.
      latents: float32, shaped as the data, 0 in padding.
      conditioning: as in encoding.
      guesses: initial guess of each block's input in encoding, as data [B, F, …] by block number, or None.
      strategies: what tells `invert_block` how to invert a block, by block number; equal blocks have equal ones.
      invert_block: (strategy, block, z, guess) -> the block's inversion for z [B, T, D] in block order.

    Returns (data, log_det, inversions): float32; log |det d latents / d data| [B] in nats; and what each block's
    inversion returned, stacked by block number, with x in data order [F, B, T, D].
    """
    config, lengths = flow.config, conditioning.lengths
    conditioning = conditioning.standardized(variables, len(latents))
    tokens = to_tokens(config, without_padding(latents, lengths))
    log_det = jnp.zeros(len(latents), jnp.float32)
    inversions: list[Inversion] = []
    if config.volume_preserving:
        variance = variables["prior"]["variance"]
        tokens, log_det = tokens * jnp.sqrt(variance)[None], log_det - 0.5 * jnp.log(variance).sum()
    orders = jnp.asarray(block_orders(config, variables))
    strategies = strategies or (None,) * config.num_blocks
    for numbers in reversed(equal_blocks(config, strategies)):

        def invert_one(tokens: jax.Array, this: Any, k: int = numbers[-1]) -> tuple[jax.Array, Inversion]:
            params, order, guess = this
            order = jnp.asarray(order_within(order, lengths))
            block = BlockInverse.of(FlowBlock(config, k, flow.kernels, parent=None), params, order, conditioning)

            def in_block_order(tokens: jax.Array) -> jax.Array:
                return block.prepend_start_token(permute(tokens, order))

            guess = None if guess is None else in_block_order(to_tokens(config, guess))
            inversion = invert_block(strategies[k], block, in_block_order(tokens), guess)
            tokens = unpermute(inversion.x[:, config.start_token :], order)
            return tokens, inversion.replace(x=tokens)

        # Cast first, since stacking copies.
        params = [cast_kernels(variables["params"][f"block_{k}"], config.compute_dtype) for k in numbers]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
        guessed = None if guesses is None else jnp.moveaxis(guesses[:, numbers.start : numbers.stop], 1, 0)
        blocks = stacked, orders[numbers.start : numbers.stop], guessed
        tokens, inversion = jax.lax.scan(invert_one, tokens, blocks, reverse=True)
        log_det = log_det + inversion.log_det.sum(0)
        inversions.insert(0, inversion)
    if config.is_sequence:
        standardize = standardizer(variables, conditioning)
        tokens, log_det = standardize.inverse(tokens), log_det + standardize.token_log_det.sum(1)
    return from_tokens(config, tokens), log_det, jax.tree.map(lambda *parts: jnp.concatenate(parts), *inversions)


def equal_blocks(config: TarFlowConfig, strategies: Sequence[Hashable]) -> list[range]:
    """Groups consecutive block numbers whose inverses differ only in parameters and order."""

    def kind(k: int) -> tuple[Any, ...]:
        limit = config.input_limit if k else config.image_limit
        return config.depths[k], limit, strategies[k], config.is_conditioned(k)

    groups = [list(numbers) for _, numbers in itertools.groupby(range(config.num_blocks), kind)]
    return [range(group[0], group[-1] + 1) for group in groups]


def standardizer(variables: Mapping[str, Any], conditioning: Conditioning) -> Affine:
    """Returns the map between sequences in their own units, x, and standardized ones, z; the identity in padding."""
    constants = variables["constants"]
    exists = conditioning.exists(jnp.arange(len(constants["mean"])))
    return Affine(constants["std"][None], constants["mean"][None]).masked(exists)
