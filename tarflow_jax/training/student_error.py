"""How far a student's images are from those that its latents came from."""

import functools
from typing import Any

import jax
import numpy as np

from tarflow_jax import programs
from tarflow_jax.data import ImageSource
from tarflow_jax.runtime import BatchRunner, LazyRows
from tarflow_jax.sampling.memory import forward_bytes
from tarflow_jax.training.state import TrainConfig


def split_errors(
    runner: BatchRunner, config: TrainConfig, variables: tuple[Any, Any], source: ImageSource, key: jax.Array
) -> np.ndarray:
    """Mean square errors float32 [N] of a split's images, unguided; noise as in `evaluation.bits_per_dim`.

    `variables` are the flow's and the student's. The noise is of the level at which samples are drawn.
    """
    assert config.student is not None
    level = np.float32(config.noise.std_max)

    def read(index: np.ndarray) -> tuple[Any, ...]:
        levels = np.full(len(index), level) if config.noise.kind == "levels" else None
        return *source.read(index), index.astype(np.int32), levels

    program = functools.partial(programs.student_error, config.student, config.model, config.noise)
    rows = LazyRows(read, len(source))
    return runner.run(
        program, variables, rows, key, bytes_per_image=2 * forward_bytes(config.model), description="student's errors"
    )
