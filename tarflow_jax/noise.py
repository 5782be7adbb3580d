"""Training noise, from 8-bit images: Gaussian augmentation, or uniform dequantisation (section 3.2 of the paper)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tarflow_jax.errors import UserError

KINDS = ("gaussian", "uniform")


@dataclasses.dataclass(frozen=True)
class Noise:
    """What is added to 8-bit images in training.

    Attributes:
      kind: "gaussian" (for samples) or "uniform" (for bits per dimension).
      std: standard deviation σ of the Gaussian in [-1, 1] units; 0 for "uniform".

    Raises:
      ValueError: for another kind, or a σ that does not fit it.
    """

    kind: str
    std: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"noise kind is {self.kind!r}; expected one of {', '.join(KINDS)}")
        if self.kind == "gaussian" and not 0 < self.std < float("inf"):
            raise UserError(f"gaussian noise has std {self.std}; expected a positive number")
        if self.kind == "uniform" and self.std:
            raise UserError(f"uniform noise has no std, but noise std is {self.std}; leave it 0")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Noise":
        """The inverse of `to_dict`.

        Raises:
          ValueError: for missing, unknown or impossible fields.
        """
        if set(fields) != {"kind", "std"} or not isinstance(fields["std"], int | float):
            raise UserError(f"noise is {dict(fields)}; expected a kind and a numeric std")
        return cls(fields["kind"], float(fields["std"]))

    def __call__(self, key: jax.Array, images: jax.Array) -> jax.Array:
        """Noisy float32 images from uint8 images [B, H, W, K]."""
        if self.kind == "uniform":
            return dequantise(key, images)
        return to_float(images) + self.std * jax.random.normal(key, images.shape, jnp.float32)


def to_float(images: jax.Array | np.ndarray) -> jax.Array:
    """8-bit value v -> v / 127.5 - 1 in [-1, 1], float32."""
    return jnp.asarray(images).astype(jnp.float32) / 127.5 - 1


def dequantise(key: jax.Array, images: jax.Array) -> jax.Array:
    """8-bit value v -> 2 (v + u) / 256 - 1 with u ~ U[0, 1), float32."""
    uniform = jax.random.uniform(key, images.shape, jnp.float32)
    return (images.astype(jnp.float32) + uniform) / 128 - 1
