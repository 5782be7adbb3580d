"""Iterative denoising: from noise level to noise level along the probability flow (arXiv 2604.20041)."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from tarflow_jax.errors import UserError
from tarflow_jax.flow import TarFlow
from tarflow_jax.sampling.denoise import denoise

KINDS = ("ode", "sde")
LEVELS = ("linear", "log")


@dataclasses.dataclass(frozen=True)
class IterativeDenoising:
    """Steps from an image's noise level down to `std_min`, and from there to none.

    Attributes:
      num_steps: N, noise levels σ_0 … σ_{N-1} = std_min; each takes a forward and a backward pass of the flow.
      std_min: the lowest level; None is the lowest of the flow's training.
      clip: clips the denoised images on the way to [-1, 1].
      kind: "ode", the probability flow, or "sde", which draws the part of the noise anew that a step takes away.
      levels: equally spaced in σ, "linear", or in log σ, "log".
      order: of the steps, 1 (Euler's) or 2 (Heun's, a second evaluation for every step but the last; "ode" alone).

    Raises ValueError: one line naming the field.
    """

    num_steps: int
    std_min: float | None = None
    clip: bool = False
    kind: str = "ode"
    levels: str = "linear"
    order: int = 1

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise UserError(f"num_steps is {self.num_steps}; expected a positive number")
        if self.std_min is not None and not 0 < self.std_min < math.inf:
            raise UserError(f"std_min is {self.std_min}; expected a positive number, or None")
        for name, valid in (("kind", KINDS), ("levels", LEVELS), ("order", (1, 2))):
            if (value := getattr(self, name)) not in valid:
                raise UserError(f"{name} is {value!r}; expected one of {', '.join(map(str, valid))}")
        if self.kind == "sde" and self.order == 2:
            raise UserError("order is 2; the 'sde' has steps of order 1 alone")


# Clipped, because a step of a thousandth of all images leaves the range that the flow was trained on, and the next ones
# then grow without bound.
DEFAULT_DENOISING = IterativeDenoising(4, levels="log", clip=True)


def iterate(
    flow: TarFlow,
    variables: dict[str, Any],
    images: jax.Array,
    labels: jax.Array | None,
    noise_std: jax.Array,
    keys: jax.Array | None,
    num_steps: jax.Array,
    std_min: jax.Array,
    *,
    method: IterativeDenoising,
    trajectory: bool = False,
) -> jax.Array:
    """Denoises images of noise level σ = noise_std.

    With x̂ = y + σ_i² ∇ log p(y | label; σ_i) and v = (y - x̂) / σ_i: y <- y - (σ_i - σ_{i+1}) v; σ_N = 0, and so the
    last step gives x̂. The loop's length is no part of the program.

    Args:
      images: float32 [B, H, W, K].
      labels: int32 [B], -1 for no class, or None.
      noise_std: σ_0, scalar.
      std_min: σ_{N-1}, scalar.
      num_steps: N, int32.
      keys: of the noise that "sde" draws, one an image, [B].
      method: its clip, kind, levels and order; the numbers are the arguments'.
      trajectory: return the image after every step, [B, N, H, W, K]; N is then method.num_steps.

    Returns float32 [B, H, W, K].
    """

    def level(i: jax.Array) -> jax.Array:
        """σ_i; with one step, σ_0 alone."""
        share = (i / jnp.maximum(num_steps - 1, 1)).astype(jnp.float32)
        linear = noise_std + share * (std_min - noise_std)
        between = linear if method.levels == "linear" else noise_std * (std_min / noise_std) ** share
        return jnp.where(i >= num_steps, 0.0, between)

    def clean(y: jax.Array, std: jax.Array) -> jax.Array:
        found = denoise(flow, variables, y, labels, std)
        return jnp.clip(found, -1.0, 1.0) if method.clip else found

    def step(i: jax.Array, y: jax.Array) -> jax.Array:
        here, there = level(i), level(i + 1)
        direction = (y - clean(y, here)) / here
        if method.kind == "sde" and keys is not None:
            kept = jnp.square(there / here)
            noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), y.shape[1:]))(keys)
            fresh = jnp.sqrt(kept) * direction + jnp.sqrt(1 - kept) * noise
            return y - here * direction + there * fresh
        if method.order == 2:
            guess = y - (here - there) * direction

            def averaged() -> jax.Array:
                return 0.5 * (direction + (guess - clean(guess, there)) / there)

            direction = jax.lax.cond(there > 0, averaged, lambda: direction)
        return y - (here - there) * direction

    if not trajectory:
        return jax.lax.fori_loop(0, num_steps, step, images)

    def recorded(y: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = step(i, y)
        return y, y

    _, path = jax.lax.scan(recorded, images, jnp.arange(method.num_steps))
    return jnp.moveaxis(path, 0, 1)
