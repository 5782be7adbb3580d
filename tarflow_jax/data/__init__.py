"""Data: sources of images by name, and the function from the step to its batch."""

from tarflow_jax.data.batches import Batch, eval_batches, train_batches
from tarflow_jax.data.registry import default_data_dir, open_source
from tarflow_jax.data.source import ArraySource, ImageSource

__all__ = [
    "ArraySource",
    "Batch",
    "ImageSource",
    "default_data_dir",
    "eval_batches",
    "open_source",
    "train_batches",
]
