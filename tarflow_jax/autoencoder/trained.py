"""A trained autoencoder: its weights, and methods for any number of images of any size."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
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

    Latents are scaled: (z - config.shift_factor) * config.scaling_factor. Images larger than `tile` are processed in
    tiles that overlap by a quarter and blend into each other, as in diffusers. That bounds memory but changes the
    result, since norms and attention see one tile at a time. Attributes: config, params (on the device), tile.
    """

    def __init__(self, config: AutoencoderConfig, params: Mapping[str, Any], *, tile: int = 512) -> None:
        """Wraps float32 parameters; raises UserError unless they fit the config and `tile` is 4n latents."""
        config, leaves = checked("config", config, AutoencoderConfig), flatten(checked("params", params, Mapping))
        check_tensors("params", {name: np.shape(leaf) for name, leaf in leaves.items()}, params_shapes(config))
        self.config, self.tile, self._runner = config, checked("tile", tile, int, low=1), BatchRunner(mesh=None)
        if tile % (4 * config.factor):
            raise UserError(f"tile is {tile}; expected a multiple of {4 * config.factor} pixels, 4 latents")
        self.params = self._runner.place(params)

    @classmethod
    def from_pretrained(cls, folder: epath.PathLike, *, dtype: str = "float32", **options: Any) -> Self:
        """Loads a folder in diffusers' format, or its subfolder vae/.

        `dtype` sets config.dtype; `options` are the constructor's. Raises FileNotFoundError for a missing file,
        UserError for a damaged file or another network.
        """
        config, params = read_folder(Path(checked("folder", folder, str | os.PathLike)))
        return cls(dataclasses.replace(config, dtype=dtype), params, **options)

    def save_pretrained(self, folder: epath.PathLike, *, dtype: str = "float32") -> None:
        """Writes a folder that diffusers' AutoencoderKL.from_pretrained can load: both files, or none.

        `dtype` is that of the saved weights, float32 or bfloat16.
        """
        folder = epath.Path(checked("folder", folder, str | os.PathLike))
        write_folder(folder, self.config, self.params, self.tile, dtype)

    def encode(self, images: Any, key: jax.Array | None = None) -> jax.Array:
        """Returns latents, float32 [B, h, w, Z]: the posterior's mean, or a sample drawn with a key of `jax.random`.

        Raises UserError unless images are floats [B, H, W, K], H and W multiples of config.factor.
        """
        mean, std = self.posterior(images)
        return mean if key is None else mean + std * jax.random.normal(key, mean.shape)

    def posterior(self, images: Any) -> tuple[jax.Array, jax.Array]:
        """Returns mean and standard deviation of the latents, float32 [B, h, w, Z]; see `encode`."""
        shift, scale, factor = self.config.shift_factor, self.config.scaling_factor, self.config.factor
        images = _checked("images", images, self.config.image_channels, factor)
        mean, log_variance = jnp.split(self._run("encode", images, self.tile, self.tile // factor), 2, axis=3)
        return (mean - shift) * scale, jnp.exp(log_variance / 2) * scale

    def decode(self, latents: Any) -> jax.Array:
        """Returns images, float32 [B, H, W, K], not clipped; raises UserError unless given floats [B, h, w, Z]."""
        latents = _checked("latents", latents, self.config.latent_channels, 1)
        z = latents / self.config.scaling_factor + self.config.shift_factor
        return self._run("decode", z, self.tile // self.config.factor, self.tile)

    def _run(self, method: str, x: np.ndarray, tile: int, out_tile: int) -> jax.Array:
        """Applies the network in batches, to tiles of side `tile` that become tiles of side `out_tile`."""
        pixels = min(x.shape[1], tile) * min(x.shape[2], tile) * self.tile**2 // tile**2
        # Roughly four activations and twice the attention logits.
        size = 16 * pixels * max(self.config.block_out_channels[:2]) + 8 * (pixels // self.config.factor**2) ** 2
        program = functools.partial(_apply, self.config, method)

        def run(x: np.ndarray) -> np.ndarray:
            return self._runner.run(program, self.params, {"x": x}, bytes_per_image=size, description=method)

        return jnp.asarray(_tiled(run, x, tile, out_tile) if max(x.shape[1:3]) > tile else run(x))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(config: AutoencoderConfig, method: str, params: Any, x: jax.Array) -> jax.Array:
    result = AutoencoderKL(config).apply({"params": params}, x, method=method)
    return jnp.concatenate(result, axis=3) if method == "encode" else result


def _tiled(function: Callable[[np.ndarray], np.ndarray], x: np.ndarray, tile: int, out_tile: int) -> np.ndarray:
    step, blend, tiles = tile - tile // 4, out_tile // 4, {}
    for i in (rows := range(0, x.shape[1], step)):
        for j in (columns := range(0, x.shape[2], step)):
            tiles[i, j] = np.array(function(x[:, i : i + tile, j : j + tile]))
            if i:
                _fade(tiles[i - step, j], tiles[i, j], blend, axis=1)
            if j:
                _fade(tiles[i, j - step], tiles[i, j], blend, axis=2)
    kept = {at: y[:, : out_tile - blend, : out_tile - blend] for at, y in tiles.items()}
    return np.concatenate([np.concatenate([kept[i, j] for j in columns], axis=2) for i in rows], axis=1)


def _fade(before: np.ndarray, after: np.ndarray, extent: int, axis: int) -> None:
    """Blends the end of `before` into the start of `after`, in place."""
    extent = min(extent, before.shape[axis], after.shape[axis])
    end, start = np.moveaxis(before, axis, 0)[-extent:], np.moveaxis(after, axis, 0)[:extent]
    share = (np.arange(extent, dtype=np.float32) / extent).reshape(-1, 1, 1, 1)
    start[...] = end * (1 - share) + start * share


def _checked(name: str, array: Any, channels: int, multiple: int) -> np.ndarray:
    """Returns float32 [B, H, W, channels]; raises UserError unless given floats with sides that are multiples."""
    array = np.asarray(array)
    fits = array.ndim == 4 and array.shape[3] == channels and array.size
    if not fits or any(side % multiple for side in array.shape[1:3]) or not jnp.issubdtype(array.dtype, jnp.floating):
        expected = f"floats [B, H, W, {channels}], B at least 1, H and W multiples of {multiple}"
        raise UserError(f"{name} are {array.dtype}{list(array.shape)}; expected {expected}")
    return array.astype(np.float32)
