"""Training noise for images of 8 or 16 bits: Gaussian augmentation at one level or many, or uniform dequantisation.

See section 3.2 of the paper, and arXiv 2604.20041 for many levels.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tarflow_jax.errors import UserError
from tarflow_jax.options import Options, option


class Levels(NamedTuple):
    """Noise levels of a batch."""

    std: jax.Array  # σ, float32 [B]
    quarter: jax.Array  # quarter of the range that σ is in, one-hot, float32 [B, 4]


@dataclasses.dataclass(frozen=True)
class Noise(Options):
    """The noise that training adds to images of 8 or 16 bits.

    "gaussian" noise is for samples, "uniform" noise (dequantisation) for bits per dimension. With "levels" each image
    gets Gaussian noise of its own level σ, and the flow is conditioned on σ.
    """

    group: ClassVar[str] = "noise"

    kind: str = option("gaussian", "Kind of noise.", choices=("gaussian", "uniform", "levels"))
    std: float = option(0.0, "Standard deviation of gaussian noise, for pixels in [-1, 1].")
    std_min: float = option(0.0, "Lowest of the noise levels.")
    std_max: float = option(0.0, "Highest of the noise levels, at which samples are drawn.")
    draw: str = option("uniform", "Draws levels uniformly in σ, or in σ² (variance).", choices=("uniform", "variance"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.kind == "gaussian") != (self.std > 0):
            expected = "a positive number" if self.kind == "gaussian" else "0"
            raise UserError(f"noise.std is {self.std}; expected {expected} for {self.kind} noise")
        if self.kind == "levels" and not 0 < self.std_min < self.std_max:
            raise UserError(f"noise levels are {self.std_min} to {self.std_max}; expected 0 < std_min < std_max")
        if self.kind != "levels" and (self.std_min or self.std_max):
            raise UserError(f"noise.std_min and std_max are set; expected 0 for {self.kind} noise")

    def __str__(self) -> str:
        if self.kind == "uniform":
            return "uniform"
        return f"gaussian {self.std:g}" if self.std else f"levels {self.std_min:g} to {self.std_max:g}"

    def levels(self, key: jax.Array, count: int) -> Levels | None:
        """Draws the levels of `count` training images; None for the other kinds."""
        if self.kind != "levels":
            return None
        std = self._level_at(jax.random.uniform(key, (count,), jnp.float32))
        quarter = jnp.floor(4 * (std - self.std_min) / (self.std_max - self.std_min)).astype(jnp.int32)
        return Levels(std, jax.nn.one_hot(jnp.clip(quarter, 0, 3), 4))

    def quantiles(self, count: int) -> np.ndarray:
        """Midpoint quantiles of the training distribution of levels, float32 [count]."""
        return np.asarray(self._level_at((jnp.arange(count, dtype=jnp.float32) + 0.5) / count))

    def _level_at(self, shares: jax.Array) -> jax.Array:
        """Maps quantiles to levels: the inverse CDF."""
        power = 2 if self.draw == "variance" else 1
        low, high = self.std_min**power, self.std_max**power
        return (low + (high - low) * shares) ** (1 / power)

    def __call__(self, key: jax.Array, images: jax.Array, noise_std: jax.Array | None = None) -> jax.Array:
        """Adds noise to images [B, H, W, K], scaled as by `to_float`; `noise_std`, σ [B], is for kind "levels"."""
        if self.kind == "uniform":
            return dequantise(key, images)
        std: Any = self.std if noise_std is None else noise_std[:, None, None, None]
        return to_float(images) + std * jax.random.normal(key, images.shape, jnp.float32)

    def of_numbered(
        self, key: jax.Array, images: jax.Array, index: jax.Array, noise_std: jax.Array | None = None
    ) -> jax.Array:
        """Adds the noise of fold_in(key, i) to image i of a data set, so that it does not depend on batching.

        `index`, int32 [B], holds the numbers i. Kinds other than "levels" ignore `noise_std`.
        """

        def add(number: jax.Array, image: jax.Array, std: jax.Array | None) -> jax.Array:
            return self(jax.random.fold_in(key, number), image[None], None if std is None else std[None])[0]

        return jax.vmap(add)(index, images, noise_std if self.kind == "levels" else None)


def to_float(images: jax.Array | np.ndarray) -> jax.Array:
    """Scales uint8 v to v / 127.5 - 1 and uint16 v to v / 32767.5 - 1, float32 in [-1, 1]; keeps float32 as it is."""
    images = jnp.asarray(images)
    if images.dtype == jnp.float32:
        return images
    return images.astype(jnp.float32) / ((_num_levels(images) - 1) / 2) - 1


def dequantise(key: jax.Array, images: jax.Array) -> jax.Array:
    """Maps uint8 v to 2 (v + u) / 256 - 1 and uint16 v to 2 (v + u) / 65536 - 1, float32, with u ~ U[0, 1)."""
    uniform = jax.random.uniform(key, images.shape, jnp.float32)
    return (images.astype(jnp.float32) + uniform) / (_num_levels(images) / 2) - 1


def _num_levels(images: jax.Array) -> int:
    return 65_536 if images.dtype == jnp.uint16 else 256
