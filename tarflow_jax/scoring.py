"""Computes log p, test loss and bits per dimension of a data set's images or sequences, batch by batch."""

import functools
from typing import Any

import jax
import numpy as np

from tarflow_jax import likelihood
from tarflow_jax.data import ImageSource, Latents, SequenceSource
from tarflow_jax.flow import Conditioning, TarFlowConfig
from tarflow_jax.likelihood import LOG_2PI, bits_per_dim
from tarflow_jax.noise import Noise
from tarflow_jax.runtime import BatchRunner, LazyBatch, device_flow, in_float32
from tarflow_jax.runtime.batch_runner import forward_bytes


def dataset_log_prob(
    runner: BatchRunner,
    config: TarFlowConfig,
    variables: dict[str, Any],
    source: ImageSource,
    noise: Noise,
    key: jax.Array,
    levels: np.ndarray | None = None,
) -> np.ndarray:
    """Returns log p(x + noise | label) of images in nats, float32 [N], at full matmul precision.

    Image i gets the noise of fold_in(key, i), so its value depends neither on the devices nor on the other images.

    Args:
      source: the images, or latents, which count by their means.
      levels: noise levels σ, float32 [n], for a noise-conditional flow; image i is evaluated at level i mod n, and
        gets noise of that level if the noise is of kind "levels".
    """

    def read(index: np.ndarray) -> dict[str, Any]:
        images, labels = source.read(index)
        noise_std = None if levels is None else levels[index % len(levels)]
        images, condition = (images.mean, images.condition) if isinstance(images, Latents) else (images, None)
        conditioning = Conditioning(labels, noise_std, condition)
        return {"images": images, "index": index.astype(np.int32), "conditioning": conditioning}

    rows = LazyBatch(read, len(source))
    function = functools.partial(likelihood.noisy_log_prob, device_flow(in_float32(config)), noise=noise)
    size = forward_bytes(config)
    return runner.run(function, variables, rows, bytes_per_image=size, description="log-likelihoods", key=key)


def sequence_log_prob(
    runner: BatchRunner, config: TarFlowConfig, variables: dict[str, Any], source: SequenceSource
) -> np.ndarray:
    """Returns log p(x | label, condition) of sequences in nats, float32 [N], at full matmul precision."""
    (x, condition, lengths), labels = source.arrays, source.labels
    rows = {"images": x, "conditioning": Conditioning(labels, condition=condition, lengths=lengths)}
    function = functools.partial(likelihood.log_prob, device_flow(in_float32(config)))
    return runner.run(function, variables, rows, bytes_per_image=forward_bytes(config))


def loss_of(log_probs: np.ndarray, num_dims: int) -> float:
    """Returns the training loss for these log p: nats per dimension, less ½ log 2π."""
    return float(-log_probs.mean(dtype=np.float64) / num_dims - 0.5 * LOG_2PI)


def image_bits_per_dim(
    runner: BatchRunner,
    config: TarFlowConfig,
    variables: dict[str, Any],
    source: ImageSource,
    key: jax.Array,
    num_draws: int = 1,
    levels: np.ndarray | None = None,
) -> np.ndarray:
    """Returns each image's bits per dimension under uniform dequantisation, float64 [N].

    In expectation over the noise, it is an upper bound. K draws give the tighter importance-weighted bound, from
    log 1/K Σ_k p(x + u_k); the paper uses one draw. Draw k uses fold_in(key, k). Other arguments are as in
    `dataset_log_prob`.
    """
    keys = [jax.random.fold_in(key, draw) for draw in range(num_draws)]
    draws = [dataset_log_prob(runner, config, variables, source, Noise("uniform"), key, levels) for key in keys]
    log_probs = np.logaddexp.reduce(np.asarray(draws, np.float64), axis=0) - np.log(num_draws)
    return bits_per_dim(log_probs, config.num_dims, config.image_bits)
