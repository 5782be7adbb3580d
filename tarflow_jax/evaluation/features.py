"""Feature networks, and the features of many images on all local devices."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from tarflow_jax.runtime import BatchRunner, make_mesh, replicated


class Features(NamedTuple):
    """What the metrics read, float32: pooled [B, D], logits [B, C] without a bias, spatial [B, S] (None for
    networks that have no part in sFID)."""

    pooled: Any
    logits: Any
    spatial: Any = None


@dataclasses.dataclass(frozen=True)
class FeatureNetwork:
    """A network that turns uint8 images [B, H, W, K] into `Features`: `apply(variables, images)`, pure.

    `apply` is the same object for the same network, because what is compiled is known by it.
    """

    name: str  # "inception" or "classifier"
    identity: str  # which weights: the hash of their file, and how good they are; printed with every distance
    preprocessing: str  # what the network does to the images, in words
    variables: Any
    apply: Callable[[Any, jax.Array], Features]
    bytes_per_image: int  # of its activations


class FeatureExtractor:
    """A `FeatureNetwork` on all devices of this process."""

    def __init__(self, network: FeatureNetwork) -> None:
        self.network = network
        mesh = make_mesh(devices=jax.local_devices())
        self._runner = BatchRunner(mesh)
        self._variables = jax.device_put(network.variables, replicated(mesh))

    def __call__(self, images: np.ndarray, description: str = "features") -> Features:
        """NumPy features of uint8 images [N, H, W, K]."""
        return self._runner.run(
            functools.partial(_features, self.network.apply),
            self._variables,
            (images,),
            bytes_per_image=self.network.bytes_per_image,
            description=description,
        )


@functools.partial(jax.jit, static_argnums=0)
def _features(apply: Callable[..., Features], variables: Any, images: jax.Array) -> Features:
    # float32 means float32: accelerators would round the factors of products otherwise.
    with jax.default_matmul_precision("highest"):
        return apply(variables, images)
