"""The flow's compiled programs: one of each for the whole process, whoever runs it.

The config is static, so pipelines, previews and evaluations of one model's shape share what is compiled. float32
means float32: TPUs and recent GPUs multiply it in fewer bits unless told.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from tarflow_jax import likelihood, sampling
from tarflow_jax.flow import TarFlow, TarFlowConfig
from tarflow_jax.noise import Noise
from tarflow_jax.student import Student, StudentConfig


def exact(config: TarFlowConfig) -> TarFlowConfig:
    """The same model computed in float32: bits per dimension of anything less are wrong in the second decimal."""
    return dataclasses.replace(config, dtype="float32")


def _compiled(function: Callable[..., Any], *static: str) -> Any:
    @functools.wraps(function)
    def at_full_precision(config: TarFlowConfig, *args: Any, **options: Any) -> Any:
        with jax.default_matmul_precision("highest" if config.dtype == "float32" else "default"):
            return function(config, *args, **options)

    return jax.jit(at_full_precision, static_argnames=("config", *static))


def _encode(
    config: TarFlowConfig,
    variables: Any,
    images: jax.Array,
    labels: jax.Array | None,
    noise_std: jax.Array | None = None,
) -> Any:
    return TarFlow(config).apply(variables, images, labels, noise_std)


def _log_prob(
    config: TarFlowConfig,
    variables: Any,
    images: jax.Array,
    labels: jax.Array | None,
    noise_std: jax.Array | None = None,
) -> jax.Array:
    return likelihood.log_prob(TarFlow(config), variables, images, labels, noise_std)


def _patch_log_prob(
    config: TarFlowConfig,
    variables: Any,
    images: jax.Array,
    labels: jax.Array | None,
    noise_std: jax.Array | None = None,
) -> jax.Array:
    return likelihood.patch_log_prob(TarFlow(config), variables, images, labels, noise_std)


def _noisy_log_prob(
    config: TarFlowConfig,
    noise: Noise,
    variables: Any,
    images: jax.Array,
    labels: jax.Array | None,
    index: jax.Array,
    noise_std: jax.Array | None,
    key: jax.Array,
) -> jax.Array:
    """log p of 8-bit images [B, H, W, K] with noise; image number i of a data set gets that of fold_in(key, i).

    `noise_std` [B] is the level of a noise with levels, and what a flow that is conditional on it is told.
    """
    noisy = noise.of_numbered(key, images, index, noise_std)
    return _log_prob(config, variables, noisy, labels if config.num_classes else None, noise_std)


def _denoise(
    config: TarFlowConfig,
    variables: Any,
    images: jax.Array,
    labels: jax.Array | None,
    noise_std: jax.Array,
    multiplier: jax.Array,
) -> jax.Array:
    return sampling.denoise(TarFlow(config), variables, images, labels, noise_std, multiplier)


def _iterate(
    config: TarFlowConfig,
    variables: Any,
    images: jax.Array,
    labels: jax.Array | None,
    key_data: jax.Array | None,
    noise_std: jax.Array,
    num_steps: jax.Array,
    std_min: jax.Array,
    **options: Any,
) -> jax.Array:
    keys = None if key_data is None else jax.random.wrap_key_data(key_data)
    return sampling.iterate(TarFlow(config), variables, images, labels, noise_std, keys, num_steps, std_min, **options)


def _decode(
    config: TarFlowConfig,
    variables: Any,
    latents: jax.Array,
    labels: jax.Array | None,
    noise_std: jax.Array | None,
    guidance: sampling.Guidance | None,
    **options: Any,
) -> sampling.Decoded:
    return sampling.decode(config, variables, latents, labels, guidance, noise_std, **options)


def _student(
    config: StudentConfig,
    variables: Any,
    latents: jax.Array,
    labels: jax.Array | None,
    weights: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    return Student(config).apply(variables, latents, labels, weights)


def _decode_from(
    config: TarFlowConfig,
    variables: Any,
    latents: jax.Array,
    labels: jax.Array | None,
    of_image: tuple[jax.Array | None, jax.Array],
    guidance: sampling.Guidance | None,
    num_updates: jax.Array,
    **options: Any,
) -> sampling.Decoded:
    """`of_image` are noise levels [B] or None, and the guess."""
    noise_std, guess = of_image
    return sampling.decode_from(config, variables, latents, guess, labels, guidance, noise_std, num_updates, **options)


encode = _compiled(_encode)
log_prob = _compiled(_log_prob)
patch_log_prob = _compiled(_patch_log_prob)
noisy_log_prob = _compiled(_noisy_log_prob, "noise")
denoise = _compiled(_denoise)
iterate = _compiled(_iterate, "method", "trajectory")
decode = _compiled(_decode, "trajectory", "decoders")
decode_from = _compiled(_decode_from, "trajectory", "decoders")
student = _compiled(_student)
