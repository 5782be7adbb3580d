"""log p(x) of noisy 8-bit images: those of a split, or those in memory."""

import functools
from typing import Any

import jax
import numpy as np

from tarflow_jax import likelihood
from tarflow_jax.data import ImageSource
from tarflow_jax.flow import TarFlowConfig
from tarflow_jax.likelihood import LOG_2PI
from tarflow_jax.noise import Noise
from tarflow_jax.runtime import BatchRunner, LazyRows, exact_flow
from tarflow_jax.runtime.batch_runner import forward_bytes


def noisy_log_prob(
    runner: BatchRunner,
    config: TarFlowConfig,
    variables: dict[str, Any],
    images: LazyRows | tuple[Any, Any],
    noise: Noise,
    key: jax.Array,
    levels: np.ndarray | None = None,
) -> np.ndarray:
    """log p(x | label) of 8-bit images with noise, float32 [N], nats, computed in float32 at full precision.

    The one rule for the noise of evaluations: image i has that of fold_in(key, i), i its place among the images.
    So it does not depend on the devices, nor on how many images there are. `images` are uint8 [N, H, W, K] and labels
    int32 [N] (or None), in memory or read when their turn comes. A flow that is conditional on noise levels is asked at
    the `levels` [n] in turn, image i at that of number i mod n, and images have noise of that level where `noise` has.
    """

    def named(images: Any, labels: Any, index: np.ndarray) -> dict[str, Any]:
        noise_std = None if levels is None else levels[index % len(levels)]
        return {"images": images, "labels": labels, "index": index.astype(np.int32), "noise_std": noise_std}

    if isinstance(images, LazyRows):
        read = images.read
        rows: Any = LazyRows(lambda index: named(*read(index), index), images.total)
    else:
        rows = named(*images, np.arange(len(images[0])))
    function = functools.partial(likelihood.noisy_log_prob, exact_flow(config), noise)
    size = forward_bytes(config)
    return runner.run(function, variables, rows, bytes_per_image=size, description="log-likelihoods", key=key)


def split_log_prob(
    runner: BatchRunner,
    config: TarFlowConfig,
    variables: dict[str, Any],
    source: ImageSource,
    noise: Noise,
    key: jax.Array,
    levels: np.ndarray | None = None,
) -> np.ndarray:
    """`noisy_log_prob` of every image of a split; on every process the whole array."""
    return noisy_log_prob(runner, config, variables, LazyRows(source.read, len(source)), noise, key, levels)


def loss_of(log_probs: np.ndarray, num_dims: int) -> float:
    """The training loss of a split from its log p: nats per dimension, less ½ log 2π."""
    return float(-log_probs.mean(dtype=np.float64) / num_dims - 0.5 * LOG_2PI)
