"""The autoencoder whose latents a flow models: AutoencoderKL, the VAE of Stable Diffusion, in Flax linen."""

from tarflow_jax.autoencoder.config import AutoencoderConfig
from tarflow_jax.autoencoder.network import AutoencoderKL
from tarflow_jax.autoencoder.trained import Autoencoder

__all__ = ["Autoencoder", "AutoencoderConfig", "AutoencoderKL"]
