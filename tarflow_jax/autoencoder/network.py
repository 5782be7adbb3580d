"""AutoencoderKL: images to the mean and variance of latents, and latents to images. Module names are diffusers'."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tarflow_jax.autoencoder.config import AutoencoderConfig
from tarflow_jax.flow.tokens import fold, unfold


class AutoencoderKL(nn.Module):
    """An encoder and a decoder. Letters: h = H / config.factor, w = W / config.factor, Z latent channels."""

    config: AutoencoderConfig

    def setup(self) -> None:
        config = self.config
        self.encoder, self.decoder = Tower(config, "down"), Tower(config, "up")
        if config.use_quant_conv:
            self.quant_conv = nn.Conv(2 * config.latent_channels, (1, 1), dtype=config.dtype)
        if config.use_post_quant_conv:
            self.post_quant_conv = nn.Conv(config.latent_channels, (1, 1), dtype=config.dtype)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Reconstructs images [B, H, W, K] from the means of their latents."""
        return self.decode(self.encode(images)[0])

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps images in [-1, 1], float32 [B, H, W, K], to (mean, log_variance) of unscaled latents.

        Both are float32 [B, h, w, Z]. The log variance is constant if config.latent_std is set.
        """
        moments = self.encoder(fold(images, self.config.patch_size))
        if self.config.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=3)
        if self.config.latent_std:
            log_variance = jnp.full_like(mean, 2 * math.log(self.config.latent_std))
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Maps unscaled latents [B, h, w, Z] to images, float32 [B, H, W, K]."""
        if self.config.use_post_quant_conv:
            latents = self.post_quant_conv(latents)
        return unfold(self.decoder(latents).astype(jnp.float32), self.config.patch_size)


class Tower(nn.Module):
    """The encoder ("down"), patches [B, H', W', D] to [B, h, w, 2Z], or the decoder ("up"), [B, h, w, Z] to patches."""

    config: AutoencoderConfig
    direction: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, up = self.config, self.direction == "up"
        widths, coarsest = config.block_out_channels[:: -1 if up else 1], config.block_out_channels[-1]
        mid_block = Level(config, coarsest, 2, attention=config.mid_block_add_attention, name="mid_block")
        x = _conv(config, widths[0], "conv_in")(x)
        x = mid_block(x) if up else x
        for i, width in enumerate(widths):
            resample = self.direction if i + 1 < len(widths) else ""
            x = Level(config, width, config.layers_per_block + up, resample, name=f"{self.direction}_blocks_{i}")(x)
        x = x if up else mid_block(x)
        channels = config.patch_channels if up else 2 * config.latent_channels
        return _conv(config, channels, "conv_out")(nn.silu(_norm(config, "conv_norm_out", x)))


class Level(nn.Module):
    """Residual layers at one resolution, with attention after the first, then a step "down" or "up" to the next."""

    config: AutoencoderConfig
    width: int
    depth: int
    resample: str = ""
    attention: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.depth):
            x = Residual(self.config, self.width, name=f"resnets_{i}")(x)
            if self.attention and i == 0:
                x = Attention(self.config, name="attentions_0")(x)
        if self.resample == "down":
            x = _conv(self.config, self.width, "downsamplers_0", strides=2, padding=((0, 1), (0, 1)))(x)
        elif self.resample == "up":
            x = _conv(self.config, self.width, "upsamplers_0")(x.repeat(2, axis=1).repeat(2, axis=2))
        return x


class Residual(nn.Module):
    """Two convolutions with a shortcut, from [B, H, W, any] to [B, H, W, width]."""

    config: AutoencoderConfig
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = _conv(self.config, self.width, "conv1")(nn.silu(_norm(self.config, "norm1", x)))
        h = _conv(self.config, self.width, "conv2")(nn.silu(_norm(self.config, "norm2", h)))
        if x.shape[3] != self.width:
            x = nn.Conv(self.width, (1, 1), dtype=self.config.dtype, name="conv_shortcut")(x)
        return x + h


class Attention(nn.Module):
    """Single-head attention over all positions of [B, h, w, C], with a shortcut."""

    config: AutoencoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = functools.partial(nn.Dense, x.shape[3], dtype=self.config.dtype)
        h = _norm(self.config, "group_norm", x).reshape(len(x), -1, 1, x.shape[3])  # [B, h w, 1, C]
        q, k, v = (dense(name=f"to_{letter}")(h) for letter in "qkv")
        # `dot_product_attention` computes its softmax in float32.
        return x + dense(name="to_out_0")(jax.nn.dot_product_attention(q, k, v)).reshape(x.shape)


def _conv(config: AutoencoderConfig, channels: int, name: str, strides: int = 1, padding: Any = 1) -> nn.Conv:
    return nn.Conv(channels, (3, 3), strides, padding, dtype=config.dtype, name=name)


def _norm(config: AutoencoderConfig, name: str, x: jax.Array) -> jax.Array:
    norm = nn.GroupNorm(config.norm_num_groups, epsilon=1e-6, use_fast_variance=False, name=name)
    return norm(x.astype(jnp.float32))
