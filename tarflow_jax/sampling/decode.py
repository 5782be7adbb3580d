"""Decodes latents to images by inverting the blocks, last to first; and encodes images under guidance."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tarflow_jax.flow import (
    Given,
    TarFlow,
    block_orders,
    cast_kernels,
    conditions,
    from_tokens,
    order_within,
    permute,
    to_tokens,
    units,
    unpermute,
    without_padding,
)
from tarflow_jax.likelihood import prior_log_prob
from tarflow_jax.sampling.block_inverse import block_inverse, equal_blocks
from tarflow_jax.sampling.decoders import Decoder, GaussSeidelJacobi, Inverted, Jacobi, Sequential, with_derivatives
from tarflow_jax.sampling.guidance import Guidance


class Decoded(NamedTuple):
    """Result of `decode_trace`. F is the number of blocks; the trajectory of sequences is standardised."""

    images: jax.Array  # float32 [B, H, W, K]
    log_det: jax.Array | None  # log |det d latents / d images| of the map that was inverted, float32 [B] in nats
    trajectory: jax.Array  # the images after 0, 1, … F inverted blocks, float32 [B, F + 1, H, W, K]
    updates: jax.Array | None  # updates of each block, int32 [B, F], by block number
    residuals: jax.Array | None  # largest change in each block's last update, float32 [B, F]; 0 if sequential


@functools.partial(jax.jit, static_argnames=("flow", "decoders"))
def decode_trace(
    flow: TarFlow,
    variables: dict[str, Any],
    latents: jax.Array,
    labels: jax.Array | None = None,
    noise_std: jax.Array | None = None,
    guess: jax.Array | None = None,
    guidance: Guidance | None = None,
    condition: jax.Array | None = None,
    lengths: jax.Array | None = None,
    null_condition: jax.Array | None = None,
    *,
    decoders: tuple[Decoder, ...] | None = None,
) -> Decoded:
    """Inverts the flow. Equal blocks share one compiled loop, so that compile time does not grow with their number.

    Args:
      latents: float32 [B, H, W, K] or [B, T, D], standard normal for samples, 0 in padding.
      labels: see `TarFlow`.
      noise_std: see `TarFlow`.
      guess: initial guess of each block's input in encoding, as images [B, F, H, W, K] by block number, for
        `decoders` that start from a student's trajectory.
      guidance: None for one pass per block; otherwise there are two, even if its weight is 0.
      condition: see `TarFlow`.
      lengths: see `TarFlow`.
      null_condition: what guidance pushes away from, shaped as `condition`; None is no condition.
      decoders: one per block, by block number; None is `Sequential` for all.
    """
    config = flow.config
    decoders = decoders or (Sequential(),) * config.num_blocks
    condition, null_condition = conditions(variables, condition, null_condition, len(latents))
    given = Given(labels, noise_std, condition, lengths, null_condition)
    latents = without_padding(latents, lengths)
    tokens, log_det = to_tokens(config, latents), jnp.zeros(len(latents), jnp.float32)
    orders = jnp.asarray(block_orders(config, variables))
    if config.volume_preserving:
        variance = variables["prior"]["variance"]
        tokens, log_det = tokens * jnp.sqrt(variance)[None], log_det - 0.5 * jnp.log(variance).sum()
    path: list[jax.Array] = [latents]
    found: list[Inverted] = []
    for numbers in reversed(equal_blocks(config, decoders, guidance)):

        def invert(tokens: jax.Array, own: Any, k: int = numbers[-1]) -> tuple[jax.Array, Inverted]:
            params, order, guessed = own
            order = jnp.asarray(order_within(order, lengths))
            block, decoder = block_inverse(flow, k, params, order, given, guidance), decoders[k]
            z, begin = block.behind_start(permute(tokens, order)), None
            if guessed is not None:
                begin = block.behind_start(permute(to_tokens(config, guessed), order))
            if isinstance(decoder, Jacobi | GaussSeidelJacobi):
                inverted = with_derivatives(decoder, block, z, begin)
            else:
                inverted = decoder.invert(block, z, begin)
            tokens = unpermute(inverted.x[:, config.start_token :], order)
            return tokens, inverted._replace(x=tokens)

        # Cast first, since stacking copies.
        params = [cast_kernels(variables["params"][f"block_{k}"], config.compute_dtype) for k in numbers]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
        guesses = None if guess is None else jnp.moveaxis(guess[:, numbers.start : numbers.stop], 1, 0)
        blocks = stacked, orders[numbers.start : numbers.stop], guesses
        tokens, inverted = jax.lax.scan(invert, tokens, blocks, reverse=True)
        log_det = log_det + inverted.log_det.sum(0)
        path += [from_tokens(config, x) for x in inverted.x][::-1]
        found.insert(0, inverted)
    if config.is_sequence:
        standardise = units(variables, given)
        tokens, log_det = standardise.inverse(tokens), log_det + standardise.token_log_det.sum(1)
    return Decoded(
        from_tokens(config, tokens),
        log_det,
        jnp.stack(path, axis=1),
        jnp.concatenate([inverted.updates for inverted in found]).T,
        jnp.concatenate([inverted.residual for inverted in found]).T,
    )


@functools.partial(jax.jit, static_argnames=("flow", "decoders"))
def decode(flow: TarFlow, variables: dict[str, Any], latents: jax.Array, *args: Any, **options: Any) -> jax.Array:
    """Returns only the images [B, H, W, K] of `decode_trace`; takes the same arguments."""
    return decode_trace(flow, variables, latents, *args, **options).images


@functools.partial(jax.jit, static_argnames=("flow", "decoders"))
def decode_log_prob(
    flow: TarFlow, variables: dict[str, Any], latents: jax.Array, *args: Any, **options: Any
) -> tuple[jax.Array, jax.Array]:
    """Returns the images of `decode_trace` and their log q for latents drawn from N(0, I), float32 [B] in nats."""
    decoded = decode_trace(flow, variables, latents, *args, **options)
    return decoded.images, decoded.log_det + prior_log_prob(flow.config, latents, options.get("lengths"))


def guided_trajectory(
    flow: TarFlow,
    variables: dict[str, Any],
    images: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    noise_std: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Encodes images to the latents that `decode` maps back to them with `Guidance(weight)`.

    The guided shift and scale of a token depend only on the tokens before it, like the unguided ones. So one pass
    over an image computes all of them.

    Args:
      images: float32 [B, H, W, K].
      labels: int32 [B], -1 for no class.
      weights: guidance weights of the images, float32 [B].
      noise_std: see `TarFlow`.

    Returns (latents [B, H, W, K], trajectory [B, F, H, W, K]); the trajectory holds each block's input as an image.
    """
    config, guidance = flow.config, Guidance(weights)
    given = Given(labels, noise_std, conditions(variables, None, None, len(images))[0])
    tokens, read = to_tokens(config, images.astype(jnp.float32)), []
    for k, order in enumerate(jnp.asarray(block_orders(config, variables))[:, None]):
        read.append(from_tokens(config, tokens))
        x = permute(tokens, order)
        block = block_inverse(flow, k, variables["params"][f"block_{k}"], order, given, guidance)
        affine, _ = block(block.behind_start(x)[:, : x.shape[1]])
        affine = affine if config.start_token else affine.of_next_token()
        tokens = unpermute(affine.forward(x), order)
    if config.volume_preserving:
        tokens = tokens * jax.lax.rsqrt(variables["prior"]["variance"])[None]
    return from_tokens(config, tokens), jnp.stack(read, axis=1)
