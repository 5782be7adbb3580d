"""Training noise, from 8-bit images: Gaussian augmentation, at one level or many, or uniform dequantisation.

Section 3.2 of the paper; many levels as arXiv 2604.20041 has them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tarflow_jax.errors import UserError

KINDS = ("gaussian", "uniform", "levels")
DRAWS = ("uniform", "variance", "lognormal")
WEIGHTS = ("std", "one")
_LOG_MEAN, _LOG_STD = -1.2, 1.0  # of a lognormal σ


class Levels(NamedTuple):
    """Noise levels of a batch."""

    std: jax.Array  # σ, float32 [B]
    weight: jax.Array  # of the image in the loss, float32 [B]
    quarter: jax.Array  # 1 in the quarter of the range that σ is in, float32 [B, 4]


@dataclasses.dataclass(frozen=True)
class Noise:
    """What is added to 8-bit images in training.

    Attributes:
      kind: "gaussian" (for samples), "uniform" (for bits per dimension), or "levels": Gaussian, each image at a level σ
        of its own, for flows that are conditional on it.
      std: standard deviation σ of the one Gaussian, in [-1, 1] units; 0 for the other kinds.
      std_min, std_max: the range of levels; 0 for the other kinds.
      draw: of a level in training: "uniform" in σ, uniform in "variance" σ², or "lognormal", clipped to the range.
      weight: of an image in the loss: "std", its σ, or "one".

    Raises:
      ValueError: for another kind, or a σ that does not fit it.
    """

    kind: str
    std: float = 0.0
    std_min: float = 0.0
    std_max: float = 0.0
    draw: str = "uniform"
    weight: str = "std"

    def __post_init__(self) -> None:
        for name, valid in (("kind", KINDS), ("draw", DRAWS), ("weight", WEIGHTS)):
            if (value := getattr(self, name)) not in valid:
                raise UserError(f"noise {name} is {value!r}; expected one of {', '.join(valid)}")
        if self.kind == "gaussian" and not 0 < self.std < float("inf"):
            raise UserError(f"gaussian noise has std {self.std}; expected a positive number")
        if self.kind != "gaussian" and self.std:
            raise UserError(f"{self.kind} noise has no std, but noise std is {self.std}; leave it 0")
        if self.kind == "levels" and not 0 < self.std_min < self.std_max < float("inf"):
            raise UserError(f"noise levels are {self.std_min} to {self.std_max}; expected 0 < std_min < std_max")
        if self.kind != "levels" and (self.std_min or self.std_max):
            raise UserError(f"{self.kind} noise has no levels, but std_min or std_max is set; leave them 0")

    def __str__(self) -> str:
        numbers = {"gaussian": f" {self.std:g}", "uniform": "", "levels": f" {self.std_min:g} to {self.std_max:g}"}
        return self.kind + numbers[self.kind]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Noise":
        """The inverse of `to_dict`, also of earlier releases.

        Raises:
          ValueError: for missing, unknown or impossible fields.
        """
        known = {"kind", "std"} <= set(fields) <= {field.name for field in dataclasses.fields(cls)}
        numbers = {name: fields[name] for name in ("std", "std_min", "std_max") if name in fields}
        if not known or not all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers.values()):
            raise UserError(f"noise is {dict(fields)}; expected a kind and a numeric std")
        return cls(**{**fields, **{name: float(number) for name, number in numbers.items()}})

    def levels(self, key: jax.Array, count: int) -> Levels | None:
        """Of `count` images in training; None for kinds without levels."""
        if self.kind != "levels":
            return None
        std = self._quantiles(jax.random.uniform(key, (count,), jnp.float32))
        quarter = jnp.floor(4 * (std - self.std_min) / (self.std_max - self.std_min)).astype(jnp.int32)
        return Levels(std, self.weights(std), jax.nn.one_hot(jnp.clip(quarter, 0, 3), 4))

    def weights(self, std: jax.Array) -> jax.Array:
        """Weights in the loss, float32 [B], of images of levels σ."""
        return std if self.weight == "std" else jnp.ones_like(std)

    def quantiles(self, count: int) -> np.ndarray:
        """`count` levels that stand for those of training, float32 [count]: the middles of as many equal shares."""
        return np.asarray(self._quantiles((jnp.arange(count, dtype=jnp.float32) + 0.5) / count))

    def _quantiles(self, shares: jax.Array) -> jax.Array:
        """The levels below which these shares of all are, float32 [count]."""
        if self.draw == "lognormal":
            drawn = jnp.exp(_LOG_MEAN + _LOG_STD * jax.scipy.special.ndtri(shares))
            return jnp.clip(drawn, self.std_min, self.std_max)
        power = 2 if self.draw == "variance" else 1
        low, high = self.std_min**power, self.std_max**power
        return (low + (high - low) * shares) ** (1 / power)

    def __call__(self, key: jax.Array, images: jax.Array, noise_std: jax.Array | None = None) -> jax.Array:
        """Noisy float32 images from uint8 images [B, H, W, K], with levels at σ = noise_std [B]."""
        if self.kind == "uniform":
            return dequantise(key, images)
        std: Any = self.std if noise_std is None else noise_std[:, None, None, None]
        return to_float(images) + std * jax.random.normal(key, images.shape, jnp.float32)

    def of_images(
        self, key: jax.Array, images: jax.Array, index: jax.Array, noise_std: jax.Array | None = None
    ) -> jax.Array:
        """As above, image number `index` [B] of a data set with the noise of fold_in(key, index)."""
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)
        if self.kind != "levels" or noise_std is None:
            return jax.vmap(lambda key, image: self(key, image[None])[0])(keys, images)
        return jax.vmap(lambda key, image, std: self(key, image[None], std[None])[0])(keys, images, noise_std)


def to_float(images: jax.Array | np.ndarray) -> jax.Array:
    """8-bit value v -> v / 127.5 - 1 in [-1, 1], float32."""
    return jnp.asarray(images).astype(jnp.float32) / 127.5 - 1


def dequantise(key: jax.Array, images: jax.Array) -> jax.Array:
    """8-bit value v -> 2 (v + u) / 256 - 1 with u ~ U[0, 1), float32."""
    uniform = jax.random.uniform(key, images.shape, jnp.float32)
    return (images.astype(jnp.float32) + uniform) / 128 - 1
