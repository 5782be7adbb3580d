"""z -> x: the inverses of the flow, guidance, and denoising."""

from tarflow_jax.sampling.decode import Decoded, Decoder, decode
from tarflow_jax.sampling.denoise import denoise
from tarflow_jax.sampling.encode import guided_trajectory
from tarflow_jax.sampling.fixed_point import GaussSeidelJacobi, Jacobi
from tarflow_jax.sampling.guidance import Guidance
from tarflow_jax.sampling.inverse import Sequential
from tarflow_jax.sampling.iterative import DEFAULT_DENOISING, IterativeDenoising, iterate
from tarflow_jax.sampling.schedule import Schedule
from tarflow_jax.sampling.warm_start import decode_from

__all__ = [
    "DEFAULT_DENOISING",
    "Decoded",
    "Decoder",
    "GaussSeidelJacobi",
    "Guidance",
    "IterativeDenoising",
    "Jacobi",
    "Schedule",
    "Sequential",
    "decode",
    "decode_from",
    "denoise",
    "guided_trajectory",
    "iterate",
]
