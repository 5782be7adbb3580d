"""Opens data sets by name, and yields training batches."""

from tarflow_jax.data.latents import Latents, LatentSource, pack_latents
from tarflow_jax.data.loader import Batch, prefetch_to_device, train_batches
from tarflow_jax.data.registry import data_folder, open_source, prepare_source
from tarflow_jax.data.sequences import Arrays, SequenceSource, open_arrays
from tarflow_jax.data.source import ArraySource, ImageSource

__all__ = [
    "ArraySource",
    "Arrays",
    "Batch",
    "ImageSource",
    "LatentSource",
    "Latents",
    "SequenceSource",
    "data_folder",
    "open_arrays",
    "open_source",
    "pack_latents",
    "prefetch_to_device",
    "prepare_source",
    "train_batches",
]
