"""Feature networks, and the features of many images on all local devices."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from tqdm import tqdm

IMAGES_PER_DEVICE = 32


class Features(NamedTuple):
    """What the metrics read, float32: pooled [B, D], logits [B, C] without a bias, spatial [B, S] (None for
    networks that have no part in sFID)."""

    pooled: Any
    logits: Any
    spatial: Any = None


@dataclasses.dataclass(frozen=True)
class FeatureNetwork:
    """A network that turns uint8 images [B, H, W, K] into `Features`.

    Attributes:
      name: "inception" or "classifier".
      identity: which weights: the hash of their file, and how good they are; printed with every distance.
      preprocessing: what the network does to the images, in words.
      variables: its weights.
      apply: (variables, uint8 images) -> Features, pure.
    """

    name: str
    identity: str
    preprocessing: str
    variables: Any
    apply: Callable[[Any, jax.Array], Features]


class FeatureExtractor:
    """A `FeatureNetwork` compiled once for batches of one size, sharded over the local devices.

    The last batch is padded, so it compiles nothing new.
    """

    def __init__(self, network: FeatureNetwork) -> None:
        self.network = network
        mesh = Mesh(np.array(jax.local_devices()), ("batch",))
        self.batch_size = IMAGES_PER_DEVICE * mesh.size
        batch = PartitionSpec("batch")
        self._apply = jax.jit(
            jax.shard_map(network.apply, mesh=mesh, in_specs=(PartitionSpec(), batch), out_specs=batch)
        )

    def batches(self, images: np.ndarray) -> Iterator[Features]:
        """NumPy features of uint8 images [N, H, W, K], a batch at a time."""
        for start in range(0, len(images), self.batch_size):
            batch = images[start : start + self.batch_size]
            kept = len(batch)
            padded = np.concatenate([batch, np.repeat(batch[:1], self.batch_size - kept, axis=0)])
            # float32 means float32: accelerators would round the factors of products otherwise.
            with jax.default_matmul_precision("highest"):
                features = self._apply(self.network.variables, jnp.asarray(padded))
            yield Features(*(None if x is None else np.asarray(x)[:kept] for x in features))

    def __call__(self, images: np.ndarray, description: str = "features") -> Features:
        """NumPy features of all of uint8 images [N, H, W, K]; a progress bar on terminals."""
        steps = -(-len(images) // self.batch_size)
        parts = list(tqdm(self.batches(images), description, steps, disable=None, leave=False))
        return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
