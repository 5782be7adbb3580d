"""How far a student's images are from those that its latents came from."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tarflow_jax.data import ImageSource
from tarflow_jax.flow import TarFlowConfig
from tarflow_jax.noise import Noise, to_float
from tarflow_jax.runtime import BatchRunner, LazyRows, device_flow
from tarflow_jax.runtime.batch_runner import forward_bytes
from tarflow_jax.student import Student, StudentConfig
from tarflow_jax.student.loss import flow_trajectory
from tarflow_jax.training.state import TrainConfig


def split_errors(
    runner: BatchRunner, config: TrainConfig, variables: tuple[Any, Any], source: ImageSource, key: jax.Array
) -> np.ndarray:
    """Mean square errors float32 [N] of a split's images, unguided; noise as in `evaluation.bits_per_dim`.

    `variables` are the flow's and the student's. The noise is of the level at which samples are drawn.
    """
    assert config.student is not None
    level = np.float32(config.noise.std_max)

    def read(index: np.ndarray) -> dict[str, Any]:
        images, labels = source.read(index)
        levels = np.full(len(index), level) if config.noise.kind == "levels" else None
        return {"images": images, "labels": labels, "index": index.astype(np.int32), "noise_std": levels}

    function = functools.partial(_student_error, config.student, config.model, config.noise)
    rows, size = LazyRows(read, len(source)), 2 * forward_bytes(config.model)
    return runner.run(function, variables, rows, bytes_per_image=size, description="student's errors", key=key)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _student_error(
    config: StudentConfig,
    flow: TarFlowConfig,
    noise: Noise,
    variables: tuple[Any, Any],
    images: jax.Array,
    labels: jax.Array,
    index: jax.Array,
    noise_std: jax.Array | None,
    key: jax.Array,
) -> jax.Array:
    noisy = noise.of_images(key, images, index, noise_std)
    latents, _ = flow_trajectory(
        device_flow(flow), variables[0], noisy, labels, noise_std if flow.noise_conditional else None
    )
    found, _ = Student(config).apply(variables[1], latents, labels, None)
    return jnp.square(found - to_float(images)).mean((1, 2, 3))
