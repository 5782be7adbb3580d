"""Sampling: decoders that invert the flow, guidance, and denoising."""

from tarflow_jax.sampling.decode import Decoded, decode, decode_log_prob, decode_trace, guided_trajectory
from tarflow_jax.sampling.decoders import Decoder, GaussSeidelJacobi, Jacobi, Sequential, StudentDecoder
from tarflow_jax.sampling.denoise import DEFAULT_DENOISING, IterativeDenoising, denoise, iterate
from tarflow_jax.sampling.guidance import Guidance

Student = StudentDecoder  # its name in calls, `decoder=Student()`

__all__ = [
    "DEFAULT_DENOISING",
    "Decoded",
    "Decoder",
    "GaussSeidelJacobi",
    "Guidance",
    "IterativeDenoising",
    "Jacobi",
    "Sequential",
    "Student",
    "StudentDecoder",
    "decode",
    "decode_log_prob",
    "decode_trace",
    "denoise",
    "guided_trajectory",
    "iterate",
]
