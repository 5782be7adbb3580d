"""z -> x: the inverse of the flow, guidance, and denoising."""

from tarflow_jax.sampling.decode import decode
from tarflow_jax.sampling.denoise import denoise
from tarflow_jax.sampling.guidance import Guidance

__all__ = ["Guidance", "decode", "denoise"]
