"""Feature networks, and their evaluation on many images over all local devices."""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from tarflow_jax.errors import one_line
from tarflow_jax.runtime import BatchRunner, make_mesh, replicated

logger = logging.getLogger(__name__)


class Features(NamedTuple):
    """Outputs of a feature network, float32: pooled [B, D], logits [B, C] without a bias, spatial [B, S] for sFID."""

    pooled: Any
    logits: Any
    spatial: Any = None


@dataclasses.dataclass(frozen=True)
class FeatureNetwork:
    """A module that maps images uint8 [B, H, W, K] to `Features`, with its parameters and their identity."""

    name: str  # "inception" or "classifier"
    identity: str  # hash and quality of the weights; printed with every distance
    preprocessing: str  # of the images inside the network, in words
    model: nn.Module
    params: Any
    bytes_per_image: int  # of activations

    def __call__(self, images: np.ndarray, description: str = "features") -> Features:
        """Returns NumPy features of uint8 images [N, H, W, K], computed on all devices of this process."""
        mesh = make_mesh(devices=jax.local_devices())
        function, params = functools.partial(_features, self.model), jax.device_put(self.params, replicated(mesh))
        return BatchRunner(mesh).run(
            function, params, {"images": images}, bytes_per_image=self.bytes_per_image, description=description
        )


@functools.partial(jax.jit, static_argnums=0)
def _features(model: nn.Module, params: Any, images: jax.Array) -> Features:
    return model.apply({"params": params}, images)


@contextlib.contextmanager
def cache_errors_logged() -> Iterator[None]:
    """Turns an OSError, as from a read-only folder, into a warning, because cached values can be recomputed."""
    try:
        yield
    except OSError as error:
        logger.warning("not cached: %s", one_line(error))
