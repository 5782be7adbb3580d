"""Yields training batches; the batch of a step is a function of (seed, step).

A run therefore sees the same images in the same order with the same flips on any number of processes, whether or not
it is interrupted.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np

from tarflow_jax.data.sequences import SequenceSource
from tarflow_jax.data.source import ImageSource

T = TypeVar("T")


class Batch(NamedTuple):
    """The rows of a batch that one process reads: images uint8 [B, H, W, K] or `Arrays`, labels int32 [B] or -1."""

    image: Any
    label: Any


def train_batches(
    source: ImageSource | SequenceSource,
    *,
    batch_size: int,
    seed: int,
    flip: bool = False,
    start_step: int = 0,
    rows: Sequence[int] | np.ndarray | None = None,
    num_workers: int = 0,
) -> Iterator[Batch]:
    """Yields shuffled batches endlessly, starting with that of `start_step`.

    Each image occurs once per epoch; a batch may span two epochs.

    Args:
      batch_size: global batch size.
      seed: determines the order and the flips.
      flip: mirror each image left to right with probability 1/2, drawn from (seed, step, row).
      rows: the rows of each batch to read (`runtime.LocalBatch.local`); None reads all.
      num_workers: number of threads that read ahead; 0 reads in the caller's thread.
    """
    import grain  # takes a third of a second, and only training needs it

    rows = np.arange(batch_size) if rows is None else np.asarray(rows)
    order_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    order = grain.MapDataset.range(len(source)).shuffle(order_seed).repeat()

    def batch_of(step: int) -> Batch:
        images, labels = source.read([order[step * batch_size + row] for row in rows.tolist()])
        if flip:
            flips = np.random.default_rng((seed, step)).random(batch_size) < 0.5  # of the global batch
            images = np.where(flips[rows, None, None, None], np.flip(images, 2), images)
        return Batch(images, labels)

    steps = grain.MapDataset.range(start_step, np.iinfo(np.int64).max).map(batch_of)
    ahead = grain.ReadOptions(num_threads=num_workers, prefetch_buffer_size=2 * num_workers)
    return iter(steps.to_iter_dataset(ahead))


def prefetch_to_device(batches: Iterator[Batch], put: Callable[[Batch], T]) -> Iterator[T]:
    """Yields `put(batch)` for each batch, with the next transfer in flight.

    `put` must start a transfer and return at once, as `jax.device_put` does.
    """
    ahead = deque(map(put, islice(batches, 2)))
    while ahead:
        yield ahead.popleft()
        ahead.extend(map(put, islice(batches, 1)))
