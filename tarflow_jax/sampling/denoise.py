"""Denoises by Tweedie's formula with the score from `jax.grad` (section 3.3 of the paper), or in steps from noise level
to noise level along the probability flow (arXiv 2604.20041)."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

from tarflow_jax.errors import UserError
from tarflow_jax.flow import Conditioning, TarFlow
from tarflow_jax.likelihood import Variables, log_prob, unit_prior
from tarflow_jax.options import Options, option


@dataclasses.dataclass(frozen=True)
class IterativeDenoising(Options):
    """Denoises in steps from an image's noise level down to `std_min`, and from there to 0.

    Attributes:
      num_steps: N noise levels σ_0 … σ_{N-1} = std_min; each takes a forward and a backward pass of the flow.
      std_min: the lowest level; None is the lowest that the flow was trained on.
      clip: clip each step's estimate of the clean image to [-1, 1].
      kind: "ode" follows the probability flow; "sde" replaces part of the noise by fresh noise at each step.
      levels: spaced equally in σ ("linear") or in log σ ("log").
      order: 1 for Euler steps; 2 for Heun steps, which evaluate twice except the last ("ode" only).

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


# Without clipping, one step in a thousand leaves the training range, and the next ones grow without bound.
DEFAULT_DENOISING = IterativeDenoising(4, levels="log", clip=True)


@functools.partial(jax.jit, static_argnames="flow")
def denoise(
    flow: TarFlow,
    variables: Variables,
    images: jax.Array,
    conditioning: Conditioning,
    *,
    noise_std: jax.Array | float,
    multiplier: jax.Array | float = 1.0,
) -> jax.Array:
    """Computes x̂ = y + s σ² ∇_y log p(y), the posterior mean of a clean image (equation 8 of the paper).

    Args:
      flow: static, as in `likelihood`.
      variables: its variables.
      images: noisy images y, float32 [B, H, W, K].
      conditioning: see `TarFlow`.
      noise_std: σ, in [-1, 1] units, a scalar or [B].
      multiplier: s; 1 gives the posterior mean.

    Returns float32 [B, H, W, K]. In VP mode log p is the density that the blocks were trained on (`unit_prior`), as in
    the reference.
    """
    variables = unit_prior(variables)
    # Examples are independent, so the gradient of the summed log-likelihood holds each one's score.
    score = jax.grad(lambda y: log_prob(flow, variables, y, conditioning).sum())(images)
    levels = jnp.broadcast_to(jnp.asarray(noise_std, jnp.float32), images.shape[:1])
    return images + multiplier * jnp.square(levels).reshape(-1, *(1,) * (images.ndim - 1)) * score


@functools.partial(jax.jit, static_argnames=("flow", "method", "trajectory"))
def iterate(
    flow: TarFlow,
    variables: Variables,
    images: jax.Array,
    conditioning: Conditioning,
    key_data: jax.Array | None = None,
    *,
    std_min: jax.Array | float,
    method: IterativeDenoising,
    trajectory: bool = False,
) -> jax.Array:
    """Denoises images of noise level σ_0 in N steps; differentiable in every mode.

    Step i is y <- y - (σ_i - σ_{i+1}) v, with v = (y - x̂) / σ_i and x̂ = y + σ_i² ∇ log p(y | label; σ_i). The last
    step gives x̂, since σ_N = 0.

    Args:
      flow: static, as in `likelihood`.
      variables: its variables.
      images: float32 [B, H, W, K].
      conditioning: see `TarFlow`; its `noise_std` [B] is σ_0 of each image.
      key_data: of one key per image for the noise of "sde", uint32 [B, …] (`jax.random.key_data`).
      std_min: σ_{N-1}, which replaces the method's.
      method: the steps.
      trajectory: return the image after every step, [B, N, H, W, K].

    Returns float32 [B, H, W, K].
    """
    keys, num_steps = None if key_data is None else jax.random.wrap_key_data(key_data), method.num_steps
    assert conditioning.noise_std is not None
    first = conditioning.noise_std.reshape(-1, *(1,) * (images.ndim - 1))

    def level(i: jax.Array) -> jax.Array:
        """σ_i [B, 1, …]; with one step, σ_0 alone."""
        share = (i / max(num_steps - 1, 1)).astype(jnp.float32)
        linear = first + share * (std_min - first)
        between = linear if method.levels == "linear" else first * (std_min / first) ** share
        return jnp.where(i >= num_steps, 0.0, between)

    def clean(y: jax.Array, std: jax.Array) -> jax.Array:
        levels = std.reshape(-1)
        images = denoise(flow, variables, y, conditioning.replace(noise_std=levels), noise_std=levels)
        return jnp.clip(images, -1.0, 1.0) if method.clip else images

    def step(y: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        here, there = level(i), level(i + 1)
        direction = (y - clean(y, here)) / here
        if method.kind == "sde" and keys is not None:
            kept = there / here
            noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), y.shape[1:]))(keys)
            fresh = kept * direction + jnp.sqrt(1 - jnp.square(kept)) * noise
            y = y - here * direction + there * fresh
            return y, y if trajectory else None
        if method.order == 2:
            guess = y - (here - there) * direction

            def averaged() -> jax.Array:
                return 0.5 * (direction + (guess - clean(guess, there)) / there)

            direction = jax.lax.cond(i + 1 < num_steps, averaged, lambda: direction)
        y = y - (here - there) * direction
        return y, y if trajectory else None

    images, path = jax.lax.scan(step, images, jnp.arange(num_steps))
    return images if path is None else jnp.moveaxis(path, 0, 1)
