"""A trained autoencoder: its weights, and methods for any number of images of any size."""

import dataclasses
import functools
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from tarflow_jax.autoencoder.config import AutoencoderConfig
from tarflow_jax.autoencoder.network import AutoencoderKL
from tarflow_jax.autoencoder.weights import params_shapes, read_folder, write_folder
from tarflow_jax.errors import UserError
from tarflow_jax.interop.tensors import check_tensors, flatten
from tarflow_jax.options import checked
from tarflow_jax.runtime import BatchRunner


class Autoencoder:
    """Encodes images [B, H, W, K] in [-1, 1] as latents [B, h, w, Z], and decodes latents.

    Latents are scaled: (z - config.shift_factor) * config.scaling_factor. Attributes: config, params (on the device).
    """

    def __init__(self, config: AutoencoderConfig, params: Mapping[str, Any]) -> None:
        """Wraps float32 parameters; raises UserError unless they fit the config."""
        config, leaves = checked("config", config, AutoencoderConfig), flatten(checked("params", params, Mapping))
        check_tensors("params", {name: np.shape(leaf) for name, leaf in leaves.items()}, params_shapes(config))
        self.config, self._runner = config, BatchRunner(mesh=None)
        self.params = self._runner.place(params)

    @classmethod
    def from_pretrained(cls, folder: epath.PathLike, *, dtype: str = "float32") -> Self:
        """Loads a folder in diffusers' format, or its subfolder vae/.

        `dtype` sets config.dtype. Raises FileNotFoundError for a missing file, UserError for a damaged file or another
        network.
        """
        config, params = read_folder(Path(checked("folder", folder, str | os.PathLike)))
        return cls(dataclasses.replace(config, dtype=dtype), params)

    def save_pretrained(self, folder: epath.PathLike, *, dtype: str = "float32") -> None:
        """Writes a folder that diffusers' AutoencoderKL.from_pretrained can load: both files, or none.

        `dtype` is that of the saved weights, float32 or bfloat16.
        """
        folder = epath.Path(checked("folder", folder, str | os.PathLike))
        write_folder(folder, self.config, self.params, dtype)

    def encode(self, images: Any, key: jax.Array | None = None) -> jax.Array:
        """Returns latents, float32 [B, h, w, Z]: the posterior's mean, or a sample drawn with a key of `jax.random`.

        Raises UserError unless images are floats [B, H, W, K], H and W multiples of config.factor.
        """
        mean, std = self.posterior(images)
        return mean if key is None else mean + std * jax.random.normal(key, mean.shape)

    def posterior(self, images: Any) -> tuple[jax.Array, jax.Array]:
        """Returns mean and standard deviation of the latents, float32 [B, h, w, Z]; see `encode`."""
        config = self.config
        images = _checked("images", images, config.image_channels, config.factor)
        mean, log_variance = jnp.split(self._run("encode", images, math.prod(images.shape[1:3])), 2, axis=3)
        return (mean - config.shift_factor) * config.scaling_factor, jnp.exp(log_variance / 2) * config.scaling_factor

    def decode(self, latents: Any) -> jax.Array:
        """Returns images, float32 [B, H, W, K], not clipped; raises UserError unless given floats [B, h, w, Z]."""
        latents = _checked("latents", latents, self.config.latent_channels, 1)
        z = latents / self.config.scaling_factor + self.config.shift_factor
        return self._run("decode", z, math.prod(z.shape[1:3]) * self.config.factor**2)

    def _run(self, method: str, x: np.ndarray, pixels: int) -> jax.Array:
        """Applies the network in batches, to images of so many pixels or to their latents."""
        # Roughly four activations and twice the attention logits.
        size = 16 * pixels * max(self.config.block_out_channels[:2]) + 8 * (pixels // self.config.factor**2) ** 2
        program = functools.partial(_apply, self.config, method)
        return jnp.asarray(self._runner.run(program, self.params, {"x": x}, bytes_per_image=size, description=method))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(config: AutoencoderConfig, method: str, params: Any, x: jax.Array) -> jax.Array:
    result = AutoencoderKL(config).apply({"params": params}, x, method=method)
    return jnp.concatenate(result, axis=3) if method == "encode" else result


def _checked(name: str, array: Any, channels: int, multiple: int) -> np.ndarray:
    """Returns float32 [B, H, W, channels]; raises UserError unless given floats with sides that are multiples."""
    array = np.asarray(array)
    fits = array.ndim == 4 and array.shape[3] == channels and array.size
    if not fits or any(side % multiple for side in array.shape[1:3]) or not jnp.issubdtype(array.dtype, jnp.floating):
        expected = f"floats [B, H, W, {channels}], B at least 1, H and W multiples of {multiple}"
        raise UserError(f"{name} are {array.dtype}{list(array.shape)}; expected {expected}")
    return array.astype(np.float32)
