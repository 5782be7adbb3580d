"""Images -> the latents that guided sampling makes them of: the guided inverse, inverted."""

from typing import Any

import jax
import jax.numpy as jnp

from tarflow_jax.flow import FlowBlock, TarFlowConfig, permute, to_images, to_tokens
from tarflow_jax.sampling.guidance import linear_weights


def guided_trajectory(
    config: TarFlowConfig,
    variables: dict[str, Any],
    images: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    noise_std: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(latents [B, H, W, K], trajectory [B, F, H, W, K]: what each block reads, as images) of `Guidance(weight)`.

    The guided shift and scale of a token are functions of the tokens before it, as the unguided ones are. So an image
    tells all of them in one pass, and `decode` of these latents with that guidance gives the image.

    Args:
      images: float32 [B, H, W, K].
      labels: int32 [B], -1 for no class.
      weights: of guidance, float32 [B], of each image.
      noise_std: as of `decode`.
    """
    following = linear_weights(weights, config.num_tokens)  # [B, T], of the tokens one further on
    of_tokens = jnp.pad(following[:, :-1], ((0, 0), (1, 0)))[:, :, None]
    tokens, read = to_tokens(config, images.astype(jnp.float32)), []
    for k in range(config.num_blocks):
        read.append(to_images(config, tokens))
        params, x = {"params": variables["params"][f"block_{k}"]}, permute(tokens, k)
        guided, unguided = (
            FlowBlock(config, k).apply(params, x, given, noise_std=noise_std, method="affine")
            for given in (labels, jnp.full_like(labels, -1))
        )
        affine = jax.tree.map(lambda a, of_unguided: a + of_tokens * (a - of_unguided), guided, unguided)
        tokens = permute(affine.forward(x), k)
    if config.volume_preserving:
        tokens = tokens * jax.lax.rsqrt(variables["prior"]["variance"])[None]
    return to_images(config, tokens), jnp.stack(read, axis=1)
