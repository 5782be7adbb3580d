"""Denoising by Tweedie's formula, the score by `jax.grad` of the log-likelihood (section 3.3 of the paper), or in
steps from noise level to noise level along the probability flow (arXiv 2604.20041)."""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from tarflow_jax.errors import UserError
from tarflow_jax.flow import TarFlow
from tarflow_jax.likelihood import log_prob, unit_prior
from tarflow_jax.options import Options, option


@dataclasses.dataclass(frozen=True)
class IterativeDenoising(Options):
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

    group: ClassVar[str] = "IterativeDenoising"

    num_steps: int = option(dataclasses.MISSING, low=1)
    std_min: float | None = option(None, low=1e-6)
    clip: bool = False
    kind: str = option("ode", choices=("ode", "sde"))
    levels: str = option("linear", choices=("linear", "log"))
    order: int = option(1, choices=(1, 2))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == "sde" and self.order == 2:
            raise UserError("IterativeDenoising.order is 2; the 'sde' has steps of order 1 alone")


# Clipped: one step in a thousand leaves the range that the flow was trained on, and the next ones grow without bound.
DEFAULT_DENOISING = IterativeDenoising(4, levels="log", clip=True)


@functools.partial(jax.jit, static_argnames="flow")
def denoise(
    flow: TarFlow,
    variables: dict[str, Any],
    images: jax.Array,
    labels: jax.Array | None,
    noise_std: jax.Array | float,
    multiplier: jax.Array | float = 1.0,
    condition: jax.Array | None = None,
    lengths: jax.Array | None = None,
) -> jax.Array:
    """x̂ = y + s σ² ∇_y log p(y), the posterior mean of a clean image given a noisy one (equation 8 of the paper).

    Args:
      images: noisy images y, float32 [B, H, W, K].
      labels: int32 [B], -1 for no class, or None.
      noise_std: σ, in [-1, 1] units, a scalar or [B].
      multiplier: s; 1 is the theory.

    Returns float32 [B, H, W, K]. In VP mode log p is the density that the blocks were trained on (`unit_prior`), as in
    the reference.
    """
    variables = unit_prior(variables)
    # The examples are independent, so the gradient of the summed log-likelihood holds each one's own score.
    levels = jnp.broadcast_to(jnp.asarray(noise_std, jnp.float32), images.shape[:1])
    score = jax.grad(lambda y: log_prob(flow, variables, y, labels, levels, condition, lengths).sum())(images)
    return images + multiplier * jnp.square(levels).reshape(-1, *(1,) * (images.ndim - 1)) * score


@functools.partial(jax.jit, static_argnames=("flow", "method", "trajectory"))
def iterate(
    flow: TarFlow,
    variables: dict[str, Any],
    images: jax.Array,
    labels: jax.Array | None,
    noise_std: jax.Array,
    key_data: jax.Array | None = None,
    condition: jax.Array | None = None,
    lengths: jax.Array | None = None,
    *,
    num_steps: jax.Array,
    std_min: jax.Array,
    method: IterativeDenoising,
    trajectory: bool = False,
) -> jax.Array:
    """Denoises images of noise level σ = noise_std.

    With x̂ = y + σ_i² ∇ log p(y | label; σ_i) and v = (y - x̂) / σ_i: y <- y - (σ_i - σ_{i+1}) v; σ_N = 0, and so the
    last step gives x̂. Another number of steps compiles nothing new.

    Args:
      images: float32 [B, H, W, K].
      labels: int32 [B], -1 for no class, or None.
      noise_std: σ_0 of each image, [B].
      key_data: of the keys by which "sde" draws noise, one an image, uint32 [B, …] (`jax.random.key_data`).
      condition: as of `TarFlow`.
      lengths: as of `TarFlow`.
      num_steps: N, int32.
      std_min: σ_{N-1}, scalar.
      method: its clip, kind, levels and order; the numbers are the arguments'.
      trajectory: return the image after every step, [B, N, H, W, K]; N is then method.num_steps.

    Returns float32 [B, H, W, K].
    """

    keys = None if key_data is None else jax.random.wrap_key_data(key_data)

    def level(i: jax.Array) -> jax.Array:
        """σ_i [B, 1, …]; with one step, σ_0 alone."""
        first = noise_std.reshape(-1, *(1,) * (images.ndim - 1))
        share = (i / jnp.maximum(num_steps - 1, 1)).astype(jnp.float32)
        linear = first + share * (std_min - first)
        between = linear if method.levels == "linear" else first * (std_min / first) ** share
        return jnp.where(i >= num_steps, 0.0, between)

    def clean(y: jax.Array, std: jax.Array) -> jax.Array:
        found = denoise(flow, variables, y, labels, std.reshape(-1), condition=condition, lengths=lengths)
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

            direction = jax.lax.cond(i + 1 < num_steps, averaged, lambda: direction)
        return y - (here - there) * direction

    if not trajectory:
        return jax.lax.fori_loop(0, num_steps, step, images)

    def recorded(y: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = step(i, y)
        return y, y

    _, path = jax.lax.scan(recorded, images, jnp.arange(method.num_steps))
    return jnp.moveaxis(path, 0, 1)
