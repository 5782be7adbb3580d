"""What a trained flow says of images: latents, log p, bits per dimension, and the score, by which it denoises."""

import dataclasses
import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tarflow_jax import programs
from tarflow_jax.arguments import (
    check_images,
    check_labels,
    check_levels,
    check_number,
    is_traced,
)
from tarflow_jax.errors import UserError
from tarflow_jax.evaluation.bits_per_dim import image_bits_per_dim
from tarflow_jax.noise import to_float
from tarflow_jax.sampling import IterativeDenoising
from tarflow_jax.sampling.iterative import DEFAULT_DENOISING
from tarflow_jax.sampling.memory import backward_bytes, forward_bytes
from tarflow_jax.trained import TrainedFlow

logger = logging.getLogger(__name__)
FAR_OUTSIDE = 4.0  # of images in [-1, 1]


@functools.cache
def _warn_of_range() -> None:  # once a process
    logger.warning("images reach far outside [-1, 1]; 8-bit values v are v / 127.5 - 1")


class FlowDensity(TrainedFlow):
    """A trained flow as a density; the other half of `TarFlowPipeline` draws from it."""

    def encode(self, images: Any, labels: Any = None, noise_std: Any = None) -> tuple[jax.Array, jax.Array]:
        """Images -> latents.

        Args:
          images: float [B, H, W, K] in [-1, 1].
          labels: int [B], -1 for no class; None for no class anywhere.
          noise_std: σ of the images, a number or [B], for flows of many noise levels, and for them alone.

        Returns:
          (latents, log_det): float32 [B, H, W, K], standard normal under the model, and float32 [B], nats.

        Raises:
          ValueError: a shape, dtype, label or noise level that does not fit the model.
        """
        program = functools.partial(programs.encode, self.config)
        levels = check_levels(self.config, noise_std, len(images))
        return self._run(program, images, labels, levels, bytes_per_image=forward_bytes(self.config))

    def log_prob(self, images: Any, labels: Any = None, noise_std: Any = None) -> jax.Array:
        """log p(x | label), float32 [B], nats; arguments and errors as of `encode`."""
        images = check_images(self.config, images)
        if not is_traced(images) and jnp.abs(images).max() > FAR_OUTSIDE:
            _warn_of_range()
        program = functools.partial(programs.log_prob, programs.exact(self.config))
        levels = check_levels(self.config, noise_std, len(images))
        return self._run(program, images, labels, levels, bytes_per_image=forward_bytes(self.config))

    def patch_log_prob(self, images: Any, labels: Any = None, noise_std: Any = None) -> jax.Array:
        """log p(x | label) by patch, float32 [B, H / P, W / P], nats, which add up to `log_prob`.

        `likelihood.patch_log_prob` says what a patch's share means. Arguments and errors as of `encode`.
        """
        program = functools.partial(programs.patch_log_prob, programs.exact(self.config))
        levels = check_levels(self.config, noise_std, len(images))
        return self._run(program, images, labels, levels, bytes_per_image=forward_bytes(self.config))

    def bits_per_dim(self, key: jax.Array, images_uint8: Any, labels: Any = None, noise_std: Any = None) -> jax.Array:
        """Bits per dimension of 8-bit images [B, H, W, K] under uniform dequantisation, float32 [B].

        An upper bound in expectation over the noise that `key` draws. A flow of many levels is asked at `noise_std`, a
        number. Raises ValueError as `encode` does.
        """
        images = np.asarray(images_uint8)
        if images.dtype != np.uint8:
            raise UserError(f"images are {images.dtype}; expected uint8 in 0..255")
        check_images(self.config, to_float(images))
        labels = check_labels(self.config, labels, len(images))
        level = check_levels(self.config, noise_std, 1)
        levels = None if level is None else np.asarray(level)
        bits = image_bits_per_dim(self._runner, self.config, self.variables, (images, labels), key, levels=levels)
        return jnp.asarray(bits, jnp.float32)

    def denoise(
        self,
        images: Any,
        labels: Any = None,
        noise_std: Any = None,
        multiplier: float = 1.0,
        method: IterativeDenoising | None = None,
        key: jax.Array | None = None,
        return_trajectory: bool = False,
    ) -> Any:
        """Tweedie's formula, x + s σ² ∇ log p(x | label), or steps of it: float32 [B, H, W, K].

        Args:
          images: float [B, H, W, K].
          labels: int [B], -1 for no class, or None.
          noise_std: σ; None is the one the model was trained with. A flow of many levels must be told (a number, or for
            a single step one for each image).
          multiplier: s of a single step; 1 is the theory.
          method: the steps, for a flow of many noise levels; None is a single one.
          key: of the noise that a method of kind "sde" draws.
          return_trajectory: also return the images before and after each of the method's N steps, [N + 1, B, H, W, K].

        Raises:
          ValueError: the model was not trained with Gaussian noise, a method without levels, or as `encode`.
        """
        if method is not None:
            path = self._iterate(images, labels, noise_std, method, key, return_trajectory)
            return (path[-1], path) if return_trajectory else path
        if return_trajectory:
            raise UserError("a trajectory is of a method's steps; give denoise a method, IterativeDenoising(…)")
        std = self.noise_std if noise_std is None else noise_std
        if std is None or (self.noise is not None and self.noise_std is None):
            kind = self.noise.kind if self.noise else "unknown"
            raise UserError(
                f"denoising needs a model trained with gaussian noise, this one's was {kind}; "
                + ("pass noise_std if you know it" if self.noise is None else "sample without denoising")
            )
        if self.config.noise_conditional:
            levels = check_levels(self.config, noise_std, len(images))
        else:
            levels = jnp.full(len(images), check_number("noise_std", std, least=0))
        return self._run(
            functools.partial(programs.denoise, self._denoiser),
            images,
            labels,
            levels,
            check_number("multiplier", multiplier),
            bytes_per_image=backward_bytes(self._denoiser),
        )

    def denoise_drawn(
        self,
        images: jax.Array,
        labels: Any = None,
        multiplier: float = 1.0,
        method: IterativeDenoising | None = None,
        key: jax.Array | None = None,
        return_trajectory: bool = False,
    ) -> Any:
        """`denoise` for what `decode` drew: by one step; of many levels by `method`, None for the default."""
        if method is None and self.config.noise_conditional:
            method = DEFAULT_DENOISING
        return self.denoise(images, labels, self.drawn_level, multiplier, method, key, return_trajectory)

    def _iterate(
        self,
        images: Any,
        labels: Any,
        noise_std: Any,
        method: IterativeDenoising,
        key: jax.Array | None,
        trajectory: bool,
    ) -> jax.Array:
        """`denoise` by steps: the images, or their trajectory."""
        if not self.config.noise_conditional:
            raise UserError("iterative denoising needs a model of many noise levels; this one is of a single level")
        std_min = method.std_min or (self.noise and self.noise.std_min)
        if not std_min:
            raise UserError("the lowest noise level of this model is not known; give IterativeDenoising a std_min")
        keys = None
        if method.kind == "sde":
            if key is None:
                raise UserError("a method of kind 'sde' draws noise; give denoise a key")
            keys = jax.random.key_data(jax.random.split(key, len(images)))
        if noise_std is None or jnp.ndim(noise_std):
            raise UserError(f"noise_std is {noise_std}; expected one number, the level that the steps begin at")
        # The numbers are traced, but for how many images a trajectory holds.
        program = dataclasses.replace(method, num_steps=method.num_steps if trajectory else 1, std_min=None)
        found = self._run(
            functools.partial(programs.iterate, self._denoiser, method=program, trajectory=trajectory),
            images,
            labels,
            keys,
            check_number("noise_std", noise_std, least=1e-6),
            jnp.int32(method.num_steps),
            check_number("std_min", std_min),
            bytes_per_image=backward_bytes(self._denoiser),
        )
        return jnp.concatenate([jnp.asarray(images)[None], jnp.moveaxis(found, 1, 0)]) if trajectory else found
