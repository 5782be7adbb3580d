"""latents -> images: the blocks inverted, last to first."""

from typing import Any

import jax
import jax.numpy as jnp

from tarflow_jax.flow import FlowBlock, TarFlowConfig, permute, to_images, to_tokens, unstack_layers
from tarflow_jax.sampling.guidance import GuidedBlock
from tarflow_jax.sampling.inverse import invert_sequentially


def decode(
    config: TarFlowConfig,
    variables: dict[str, Any],
    latents: jax.Array,
    labels: jax.Array | None = None,
    weights: jax.Array | None = None,
    temperature: jax.Array | float = 1.0,
    target: str = "both",
    trajectory: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Inverts the flow.

    Args:
      latents: float32 [B, H, W, K], standard normal for samples.
      labels: int32 [B], -1 for no class; None for no class anywhere.
      weights: `Guidance.weights`, float32 [T], or None for no guidance.
      temperature: τ of the unguided pass.
      target: what is guided: "both", "log_scale" or "shift".
      trajectory: whether to return the images on the way.

    Returns:
      (images, trajectory): float32 [B, H, W, K], and [B, F + 1, H, W, K], the images after 0, 1, … F inverted
      blocks, or None.
    """
    tokens = to_tokens(config, latents)
    images = [latents]
    if config.volume_preserving:
        tokens = tokens * jnp.sqrt(variables["prior"]["variance"])[None]
    for k in reversed(range(config.num_blocks)):
        params = unstack_layers(variables["params"][f"block_{k}"], config.depths[k])
        block = GuidedBlock(
            FlowBlock(config, k, unrolled=True), params, labels, weights, jnp.float32(temperature), target
        )
        tokens = permute(invert_sequentially(block, permute(tokens, k)), k)
        images.append(to_images(config, tokens))
    return images[-1], jnp.stack(images, axis=1) if trajectory else None
