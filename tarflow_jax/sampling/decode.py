"""latents -> images: the blocks inverted, last to first."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tarflow_jax.flow import TarFlowConfig, permute, to_images, to_tokens
from tarflow_jax.sampling.blocks import alike, of_stack, stacked_blocks
from tarflow_jax.sampling.fixed_point import GaussSeidelJacobi, Jacobi
from tarflow_jax.sampling.guidance import Guidance
from tarflow_jax.sampling.inverse import Inverted, Sequential

Decoder = Sequential | Jacobi | GaussSeidelJacobi


class Decoded(NamedTuple):
    """What `decode` returns."""

    images: jax.Array  # float32 [B, H, W, K]
    trajectory: jax.Array | None  # the images after 0, 1, … F inverted blocks, [B, F + 1, H, W, K]
    iterations: jax.Array  # updates that each block took, int32 [B, F], by block number
    residual: jax.Array  # each block's last change, float32 [B, F]; 0 where it was sequential


def decode(
    config: TarFlowConfig,
    variables: dict[str, Any],
    latents: jax.Array,
    labels: jax.Array | None = None,
    guidance: Guidance | None = None,
    noise_std: jax.Array | None = None,
    *,
    trajectory: bool = False,
    decoders: tuple[Decoder, ...] | None = None,
) -> Decoded:
    """Inverts the flow: blocks that are alike in one compiled loop, so that compiling takes no longer for many of them.

    Args:
      latents: float32 [B, H, W, K], standard normal for samples.
      labels: int32 [B], -1 for no class; None for no class anywhere.
      guidance: None for one pass a block; with guidance there are two, even where its weight is 0.
      noise_std: σ of the images, float32 [B], of a flow that is conditional on it.
      trajectory: whether to return the images on the way.
      decoders: how each block is inverted, by block number; None is `Sequential` for all.
    """
    tokens = to_tokens(config, latents)
    if config.volume_preserving:
        tokens = tokens * jnp.sqrt(variables["prior"]["variance"])[None]
    decoders = decoders or (Sequential(),) * config.num_blocks
    images: list[jax.Array] = [latents]
    found: list[Inverted] = []
    for numbers in reversed(alike(config, decoders, guidance)):

        def invert(z: jax.Array, prepared: Any, k: int = numbers[-1]) -> tuple[jax.Array, Inverted]:
            inverted = decoders[k].invert(of_stack(config, k, prepared, labels, guidance, noise_std), z)
            return jnp.flip(inverted.x, 1), inverted  # the block before this one reads the other way

        stack = stacked_blocks(config, variables["params"], numbers)
        flipped, inverted = jax.lax.scan(invert, permute(tokens, numbers[-1]), stack, reverse=True)
        tokens = permute(flipped, numbers[0] + 1)
        images += [to_images(config, permute(x, k)) for k, x in zip(numbers, inverted.x, strict=True)][::-1]
        found.insert(0, inverted)
    return Decoded(
        to_images(config, tokens),
        jnp.stack(images, axis=1) if trajectory else None,
        jnp.concatenate([inverted.iterations for inverted in found]).T,
        jnp.concatenate([inverted.residual for inverted in found]).T,
    )
