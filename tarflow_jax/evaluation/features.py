"""Feature networks, and their features of many images on all local devices."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from tarflow_jax.runtime import BatchRunner, make_mesh, replicated


class Features(NamedTuple):
    """Outputs of a feature network, float32: pooled [B, D], logits [B, C] without a bias, spatial [B, S] for sFID."""

    pooled: Any
    logits: Any
    spatial: Any = None


@dataclasses.dataclass(frozen=True)
class FeatureNetwork:
    """A pure function `apply(variables, images uint8 [B, H, W, K]) -> Features`, and its weights.

    Pass the same function object for the same network: compiled programs are cached by it.
    """

    name: str  # "inception" or "classifier"
    identity: str  # hash of the weights' file and how good they are; printed with every distance
    preprocessing: str  # of the images inside the network, in words
    variables: Any
    apply: Callable[[Any, jax.Array], Features]
    bytes_per_image: int  # of activations


class FeatureExtractor:
    """Runs a `FeatureNetwork` on all devices of this process."""

    def __init__(self, network: FeatureNetwork) -> None:
        self.network = network
        mesh = make_mesh(devices=jax.local_devices())
        self._runner = BatchRunner(mesh)
        self._variables = jax.device_put(network.variables, replicated(mesh))

    def __call__(self, images: np.ndarray, description: str = "features") -> Features:
        """Returns NumPy features of uint8 images [N, H, W, K]."""
        return self._runner.run(
            functools.partial(_features, self.network.apply),
            self._variables,
            {"images": images},
            bytes_per_image=self.network.bytes_per_image,
            description=description,
        )


@functools.partial(jax.jit, static_argnums=0)
def _features(apply: Callable[..., Features], variables: Any, images: jax.Array) -> Features:
    return apply(variables, images)
