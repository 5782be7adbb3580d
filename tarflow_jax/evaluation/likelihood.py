"""Likelihood of a data set under a flow: bits or nats per dimension of images, nats of sequences."""

from typing import Any

import jax
import numpy as np

from tarflow_jax.data import ImageSource, SequenceSource
from tarflow_jax.errors import UserError
from tarflow_jax.pipeline import TarFlowPipeline
from tarflow_jax.runtime import BatchRunner
from tarflow_jax.scoring import dataset_log_prob, image_bits_per_dim, sequence_log_prob


def measure_likelihood(
    pipe: TarFlowPipeline,
    source: ImageSource | SequenceSource,
    key: jax.Array,
    noise_std: float | None = None,
    num_draws: int = 1,
    runner: BatchRunner | None = None,
) -> dict[str, Any]:
    """Returns mean, standard error and number of images by printed name.

    The mean is of bits per dimension; of nats per dimension of noisy data, if training noise was Gaussian; or of nats
    of sequences.

    Args:
      noise_std: σ of the images, for a noise-conditional flow.
      num_draws: draws of uniform noise in the importance-weighted bound of bits per dimension.
      runner: the devices; all processes of its mesh share the work. None is JAX's default device.
    """
    config, runner = pipe.config, runner or BatchRunner()
    variables = runner.place(pipe.variables)
    levels = None if noise_std is None else np.array([noise_std], np.float32)
    settings: dict[str, Any] = {}
    if isinstance(source, SequenceSource):
        values, unit = sequence_log_prob(runner, config, variables, source), "log p, nats"
    elif pipe.noise_std is None:
        values, unit = image_bits_per_dim(runner, config, variables, source, key, num_draws, levels), "bits/dim"
        settings = {"dequantisation draws": num_draws, "precision": "float32, full matmul"}
        if config.image_bits != 8:
            settings["levels"] = 2**config.image_bits
    else:
        log_probs = dataset_log_prob(runner, config, variables, source, pipe.noise, key, levels)
        values = -log_probs.astype(np.float64) / config.num_dims
        unit = f"nats/dim of noisy {'data' if config.image_bits else 'latents'}"
        settings = {} if noise_std is None else {"noise level": noise_std}
    if not np.isfinite(values).all():
        raise UserError("log p(x) is not finite for some images; their mean would be no number")
    error = float(values.std(ddof=1) / np.sqrt(len(values)))
    kind = "sequences" if config.is_sequence else "images"
    return {unit: float(values.mean()), "standard error": error, kind: len(values), **settings}
