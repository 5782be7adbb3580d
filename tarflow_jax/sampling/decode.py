"""latents -> images: the blocks inverted, last to first; and what guided decoding undoes."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tarflow_jax.flow import TarFlow, cast_kernels, is_reversed, permute, to_images, to_tokens
from tarflow_jax.sampling.block_inverse import block_inverse, equal_blocks
from tarflow_jax.sampling.decoders import Decoder, GaussSeidelJacobi, Inverted, Jacobi, Sequential, with_derivatives
from tarflow_jax.sampling.guidance import Guidance


class Decoded(NamedTuple):
    """Images and how they were found. F is the number of blocks."""

    images: jax.Array  # float32 [B, H, W, K]
    log_det: jax.Array | None  # log |det d latents / d images| of the map that was inverted, float32 [B] in nats
    trajectory: jax.Array  # the images after 0, 1, … F inverted blocks, float32 [B, F + 1, H, W, K]
    updates: jax.Array | None  # of each block, int32 [B, F], by block number
    residuals: jax.Array | None  # each block's last change, float32 [B, F]; 0 where it was sequential


@functools.partial(jax.jit, static_argnames=("flow", "decoders"))
def decode_trace(
    flow: TarFlow,
    variables: dict[str, Any],
    latents: jax.Array,
    labels: jax.Array | None = None,
    noise_std: jax.Array | None = None,
    guess: jax.Array | None = None,
    guidance: Guidance | None = None,
    *,
    decoders: tuple[Decoder, ...] | None = None,
) -> Decoded:
    """Inverts the flow: equal blocks in one compiled loop, so that compiling takes no longer for many of them.

    Args:
      latents: float32 [B, H, W, K], standard normal for samples.
      labels: int32 [B], -1 for no class; None for no class anywhere.
      noise_std: σ of the images, float32 [B], for a noise-conditional flow.
      guess: what each block is thought to read, as images [B, F, H, W, K] by block number, where `decoders` begin at
        a student's trajectory.
      guidance: None for one pass a block; with guidance there are two, even where its weight is 0.
      decoders: how each block is inverted, by block number; None is `Sequential` for all.
    """
    config = flow.config
    decoders = decoders or (Sequential(),) * config.num_blocks
    tokens, log_det = to_tokens(config, latents), jnp.zeros(len(latents), jnp.float32)
    if config.volume_preserving:
        variance = variables["prior"]["variance"]
        tokens, log_det = tokens * jnp.sqrt(variance)[None], log_det - 0.5 * jnp.log(variance).sum()
    path: list[jax.Array] = [latents]
    found: list[Inverted] = []
    for numbers in reversed(equal_blocks(config, decoders, guidance)):

        def invert(tokens: jax.Array, block: Any, k: int = numbers[-1]) -> tuple[jax.Array, Inverted]:
            params, reverse, guessed = block
            given, z = (params, reverse, labels, guidance, noise_std), permute(tokens, reverse)
            begin = None if guessed is None else permute(to_tokens(config, guessed), reverse)
            if isinstance(decoders[k], Jacobi | GaussSeidelJacobi):
                fixed, fixed_z, begin = jax.lax.stop_gradient((given, z, begin))
                inverted = decoders[k].invert(block_inverse(flow, k, *fixed), fixed_z, begin)
                inverted = with_derivatives(inverted, block_inverse(flow, k, *given), z)
            else:
                inverted = decoders[k].invert(block_inverse(flow, k, *given), z, begin)
            tokens = permute(inverted.x, reverse)
            return tokens, inverted._replace(x=tokens)

        # Cast before they are stacked, which copies them.
        params = [cast_kernels(variables["params"][f"block_{k}"], config.compute_dtype) for k in numbers]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
        reverse = jnp.array([is_reversed(k) for k in numbers])
        guesses = None if guess is None else jnp.moveaxis(guess[:, numbers[0] : numbers[-1] + 1], 1, 0)
        tokens, inverted = jax.lax.scan(invert, tokens, (stacked, reverse, guesses), reverse=True)
        log_det = log_det + inverted.log_det.sum(0)
        path += [to_images(config, x) for x in inverted.x][::-1]
        found.insert(0, inverted)
    return Decoded(
        to_images(config, tokens),
        log_det,
        jnp.stack(path, axis=1),
        jnp.concatenate([inverted.updates for inverted in found]).T,
        jnp.concatenate([inverted.residual for inverted in found]).T,
    )


@functools.partial(jax.jit, static_argnames=("flow", "decoders"))
def decode(flow: TarFlow, variables: dict[str, Any], latents: jax.Array, *args: Any, **options: Any) -> jax.Array:
    """The images [B, H, W, K] of `decode_trace`, and nothing else of it computed; arguments as there."""
    return decode_trace(flow, variables, latents, *args, **options).images


def guided_trajectory(
    flow: TarFlow,
    variables: dict[str, Any],
    images: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    noise_std: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Encodes images into the latents from which `decode` draws them with `Guidance(weight)`.

    The guided shift and scale of a token are functions of the tokens before it, like the unguided ones. So one pass
    over an image finds all of them.

    Args:
      images: float32 [B, H, W, K].
      labels: int32 [B], -1 for no class.
      weights: guidance weights of the images, float32 [B].
      noise_std: as of `decode`.

    Returns (latents [B, H, W, K], trajectory [B, F, H, W, K]: what each block reads, as images).
    """
    config, guidance = flow.config, Guidance(weights)
    tokens, read = to_tokens(config, images.astype(jnp.float32)), []
    for k in range(config.num_blocks):
        read.append(to_images(config, tokens))
        reverse = is_reversed(k)
        x = permute(tokens, reverse)
        block = block_inverse(flow, k, variables["params"][f"block_{k}"], reverse, labels, guidance, noise_std)
        affine, _ = block(x)
        tokens = permute(affine.of_next_token().forward(x), reverse)
    if config.volume_preserving:
        tokens = tokens * jax.lax.rsqrt(variables["prior"]["variance"])[None]
    return to_images(config, tokens), jnp.stack(read, axis=1)
