"""latents -> images: the blocks inverted, last to first."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tarflow_jax.flow import FlowBlock, TarFlowConfig, permute, to_images, to_tokens, unstack_layers
from tarflow_jax.sampling.fixed_point import GaussSeidelJacobi, Jacobi
from tarflow_jax.sampling.guidance import Guidance, GuidedBlock
from tarflow_jax.sampling.inverse import Sequential

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
    """Inverts the flow.

    Args:
      latents: float32 [B, H, W, K], standard normal for samples.
      labels: int32 [B], -1 for no class; None for no class anywhere.
      guidance: None for one pass a block; with guidance there are two, even where its weight is 0.
      noise_std: σ of the images, float32 [B], of a flow that is conditional on it.
      trajectory: whether to return the images on the way.
      decoders: how each block is inverted, by block number; None is `Sequential` for all.
    """
    tokens = to_tokens(config, latents)
    images, found = [latents], []
    if config.volume_preserving:
        tokens = tokens * jnp.sqrt(variables["prior"]["variance"])[None]
    for k in reversed(range(config.num_blocks)):
        block = guided_block(config, variables["params"], k, labels, guidance, noise_std)
        inverted = (decoders[k] if decoders else Sequential()).invert(block, permute(tokens, k))
        tokens = permute(inverted.x, k)
        images.append(to_images(config, tokens))
        found.append(inverted)
    found.reverse()
    return Decoded(
        images[-1],
        jnp.stack(images, axis=1) if trajectory else None,
        jnp.stack([inverted.iterations for inverted in found], axis=1),
        jnp.stack([inverted.residual for inverted in found], axis=1),
    )


def guided_block(
    config: TarFlowConfig,
    params: dict[str, Any],
    k: int,
    labels: jax.Array | None,
    guidance: Guidance | None,
    noise_std: jax.Array | None = None,
) -> GuidedBlock:
    """Block number k with its own parameters, ready to be inverted; arguments as of `decode`."""
    own = unstack_layers(params[f"block_{k}"], config.depths[k])
    if guidance is not None and not guidance.covers(k, config.num_blocks):
        guidance = None
    return GuidedBlock(FlowBlock(config, k, unrolled=True), own, labels, noise_std, guidance)
