"""The stack of blocks, and the learned prior variance of the volume-preserving mode."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from tarflow_jax.flow.block import FlowBlock
from tarflow_jax.flow.config import TarFlowConfig
from tarflow_jax.flow.tokens import is_reversed, to_images, to_tokens
from tarflow_jax.flow.transformer import Kernels

PRIOR_RATE = 0.1


class TarFlow(nn.Module):
    """x -> latents, a stack of `FlowBlock`s ("Normalizing Flows are Capable Generative Models", arXiv 2412.06329).

    Variables: `params`, and in VP mode `prior/variance` [T, D], the flow's last, diagonal affine layer.
    Sows `intermediates/block_outputs`: the tokens [B, T, D] after each block.
    """

    config: TarFlowConfig
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(
        self, images: jax.Array, labels: jax.Array | None = None, noise_std: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Encodes images.

        Args:
          images: float32 [B, H, W, K], in [-1, 1] plus noise.
          labels: int32 [B], -1 for no class; None for no class anywhere.
          noise_std: σ of each image's noise, float32 [B], for a noise-conditional flow.

        Returns (latents, log_det): float32 [B, H, W, K], standard normal under the model, and float32 [B] in nats, the
        log absolute determinant of the Jacobian d latents / d images.
        """
        config = self.config
        tokens = to_tokens(config, images.astype(jnp.float32))
        log_det = jnp.zeros(images.shape[0], jnp.float32)
        for k in range(config.num_blocks):
            block = FlowBlock(config, k, self.kernels, name=f"block_{k}")
            tokens, block_log_det = block(tokens, is_reversed(k), labels, noise_std)
            log_det = log_det + block_log_det
            self.sow("intermediates", "block_outputs", tokens)
        if config.volume_preserving:
            shape = (config.num_tokens, config.token_dim)
            variance = self.variable("prior", "variance", jnp.ones, shape, jnp.float32).value
            tokens = tokens * jax.lax.rsqrt(variance)[None]
            log_det = log_det - 0.5 * jnp.log(variance).sum()
        return to_images(config, tokens), log_det


def updated_prior(variance: jax.Array, block_output: jax.Array) -> jax.Array:
    """Running mean of z², [T, D], from the last block's output [B, T, D] (VP mode)."""
    return variance + PRIOR_RATE * (jnp.square(block_output).mean(0) - variance)
