"""The front door: a trained TarFlow to encode, decode, score, denoise and sample with."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from tarflow_jax import interop
from tarflow_jax.arguments import (
    DecoderChoice,
    check_decoder,
    check_guidance,
    check_images,
    check_labels,
)
from tarflow_jax.errors import UserError
from tarflow_jax.flow import TarFlow, TarFlowConfig
from tarflow_jax.likelihood import bits_per_dim, log_prob
from tarflow_jax.noise import Noise, dequantise
from tarflow_jax.runtime import Parts
from tarflow_jax.sampling import Guidance, Schedule, Sequential, decode, denoise
from tarflow_jax.sampling.memory import backward_bytes, decode_bytes, forward_bytes
from tarflow_jax.training.workdir import read_workdir

DEFAULT_MEMORY_BOUND = 2 * 2**30


class TarFlowPipeline:
    """A trained flow. Every method is compiled once for each batch shape.

    A batch too large for `memory_bound` is split into equal parts, the last one padded, so that a ragged batch
    compiles nothing new. Likelihoods are float32 at full matmul precision; the rest runs in `config.dtype`.

    Attributes:
      config: the model's shape.
      variables: the parameters in use (the averaged ones where an average was kept) and, in VP mode, the prior.
      noise: what it was trained with; None if unknown.
    """

    def __init__(
        self,
        config: TarFlowConfig,
        variables: Mapping[str, Any],
        noise: Noise | None = None,
        *,
        ema_params: Mapping[str, Any] | None = None,
        card: Mapping[str, Any] | None = None,
        schedule: Schedule | None = None,
        mesh: Mesh | None = None,
        memory_bound: int = DEFAULT_MEMORY_BOUND,
    ) -> None:
        """Wraps variables.

        Args:
          config: the model's shape. variables: of that shape. noise: of its training.
          ema_params: the parameters' average, used instead of the raw ones, which are kept to be saved beside it.
          card: what a saved model's card tells, see `interop.save_model`.
          schedule: what `decoder="auto"` uses.
          mesh: devices to spread over (`tarflow_jax.runtime.make_mesh`); None is the default device.
          memory_bound: bytes that a batch's activations may take, on all devices together.
        """
        self.config, self.noise = config, noise
        self.schedule, self._card, self._raw_params = schedule, card, None
        if ema_params is not None:
            self._raw_params = variables["params"]
            variables = {**variables, "params": ema_params}
        self._parts = Parts(mesh, memory_bound)
        self.variables = self._parts.place(dict(variables))
        exact = TarFlow(dataclasses.replace(config, dtype="float32"))
        # On a CPU computing activations again is faster than keeping them.
        keep_all = dataclasses.replace(config, remat="none")
        recompute = self._parts.on_cores or backward_bytes(keep_all) > memory_bound // 8
        remat = "full" if recompute else "none"
        self._denoiser = dataclasses.replace(config, remat=remat)
        self._encode = jax.jit(_full_precision(config, TarFlow(config).apply))
        self._log_prob = jax.jit(_full_precision(exact.config, functools.partial(log_prob, exact)))
        self._decode = jax.jit(
            _full_precision(config, functools.partial(decode, config)),
            static_argnames=("target", "trajectory", "decoders"),
        )
        self._denoise = jax.jit(_full_precision(config, functools.partial(denoise, TarFlow(self._denoiser))))

    @property
    def noise_std(self) -> float | None:
        """σ of the Gaussian training noise; None for a model trained otherwise."""
        return self.noise.std if self.noise and self.noise.kind == "gaussian" else None

    @classmethod
    def from_pretrained(cls, name: epath.PathLike, *, best: bool = False, **options: Any) -> "TarFlowPipeline":
        """Opens a training workdir, a saved model's folder, or a model of the hub ("owner/name").

        Args:
          name: a workdir may be in an object store (gs://).
          best: of a workdir, the checkpoint of the lowest test loss instead of the last.
          options: `mesh` and `memory_bound`, see the constructor.

        Raises:
          FileNotFoundError: nothing of the kind there. ValueError: what is there is damaged or of another kind.
        """
        workdir = epath.Path(name)
        if (workdir / "checkpoints").is_dir():
            run = read_workdir(workdir, options.get("mesh"), best=best)
            schedule = Schedule.read(workdir, run.config.num_blocks)
            return cls(
                run.config,
                run.variables,
                run.noise,
                ema_params=run.ema_params,
                card=run.card,
                schedule=schedule,
                **options,
            )
        if best:
            raise UserError(f"{name} is no training workdir; only these have a best checkpoint")
        saved = interop.load_model(name)
        schedule = Schedule.read(name, saved.config.num_blocks)
        return cls(
            saved.config,
            saved.variables,
            saved.noise,
            ema_params=saved.ema_params,
            schedule=schedule,
            **options,
        )

    @classmethod
    def from_torch(
        cls,
        path: str | Path,
        image_size: int | tuple[int, int],
        image_channels: int,
        patch_size: int,
        noise_std: float | None = None,
        **options: Any,
    ) -> "TarFlowPipeline":
        """Reads a state dict of the PyTorch reference; see `interop.load_torch` for arguments and errors."""
        config, variables = interop.load_torch(path, image_size, image_channels, patch_size)
        return cls(config, variables, None if noise_std is None else Noise("gaussian", noise_std), **options)

    def to_torch(self, path: str | Path) -> None:
        """Writes a state dict that the PyTorch reference loads with strict=True; see `interop.save_torch`."""
        interop.save_torch(path, self.config, self.variables)

    def save_pretrained(
        self, folder: str | Path, *, dtype: str = "float32", card: Mapping[str, Any] | None = None
    ) -> None:
        """Writes config.json, model.safetensors and a model card; see `interop.save_model`.

        `card` is added to what is known of the run. The average and the raw parameters are both kept.
        """
        variables, ema_params = self.variables, None
        if self._raw_params is not None:
            variables, ema_params = {**variables, "params": self._raw_params}, variables["params"]
        interop.save_model(
            folder,
            config=self.config,
            variables=variables,
            noise=self.noise,
            ema_params=ema_params,
            dtype=dtype,
            card={**(self._card or {}), **(card or {})},
        )
        if self.schedule:
            self.schedule.write(Path(folder))

    def encode(self, images: Any, labels: Any = None) -> tuple[jax.Array, jax.Array]:
        """Images -> latents.

        Args:
          images: float [B, H, W, K] in [-1, 1].
          labels: int [B], -1 for no class; None for no class anywhere.

        Returns:
          (latents, log_det): float32 [B, H, W, K], standard normal under the model, and float32 [B], nats.

        Raises:
          ValueError: a shape, dtype or label that does not fit the model.
        """
        images, labels = check_images(self.config, images), check_labels(self.config, labels, len(images))
        return self._parts.run(self._encode, self.variables, images, labels, bytes_per_image=forward_bytes(self.config))

    def decode(
        self,
        latents: Any,
        labels: Any = None,
        guidance: Guidance | None = None,
        return_trajectory: bool = False,
        decoder: DecoderChoice = None,
        return_statistics: bool = False,
    ) -> Any:
        """Latents -> images, the exact inverse of `encode` when there is no guidance.

        Args:
          latents: float [B, H, W, K], standard normal for samples.
          labels: int [B], -1 for no class; None for no class anywhere.
          guidance: see `Guidance`; None or weight 0 for none.
          return_trajectory: also return the images after 0, 1, … F inverted blocks.
          decoder: `Sequential()` (None; exact), `Jacobi()`, `GaussSeidelJacobi(…)`, a sequence of them by block
            number, or "auto": what launch.tune_decoder found, `Sequential()` where it did not look.
          return_statistics: also return each block's updates and last change.

        Returns:
          float32 images [B, H, W, K]; if more is asked for, a tuple with the trajectory [F + 1, B, H, W, K] and
          (iterations, residual), int32 and float32 [F, B] by block number, behind it.

        Raises:
          ValueError: a shape, dtype or label that does not fit the model, class guidance of an unconditional one, or
            as many decoders as it has no blocks.
        """
        latents, labels = check_images(self.config, latents), check_labels(self.config, labels, len(latents))
        weights, temperature, target = check_guidance(self.config, guidance)
        decoders = check_decoder(self.config, self.schedule, decoder, len(latents))
        one_by_one = decoders is None or Sequential() in decoders
        decoded = self._parts.run(
            self._decode,
            self.variables,
            latents,
            labels,
            weights,
            temperature,
            bytes_per_image=decode_bytes(self.config, guided=weights is not None, parallel=decoders is not None),
            # For one image XLA's CPU code copies the caches at every token; for two it does not.
            smallest=2 if self._parts.on_cores and one_by_one else 1,
            target=target,
            trajectory=return_trajectory,
            decoders=decoders,
        )
        results = [decoded.images]
        if return_trajectory:
            results.append(jnp.moveaxis(decoded.trajectory, 1, 0))
        if return_statistics:
            results.append((decoded.iterations.T, decoded.residual.T))
        return tuple(results) if results[1:] else decoded.images

    def log_prob(self, images: Any, labels: Any = None) -> jax.Array:
        """log p(x | label), float32 [B], nats; arguments and errors as of `encode`."""
        images, labels = check_images(self.config, images), check_labels(self.config, labels, len(images))
        return self._parts.run(
            self._log_prob, self.variables, images, labels, bytes_per_image=forward_bytes(self.config)
        )

    def bits_per_dim(self, key: jax.Array, images_uint8: Any, labels: Any = None) -> jax.Array:
        """Bits per dimension of 8-bit images [B, H, W, K] under uniform dequantisation, float32 [B].

        An upper bound in expectation over the noise that `key` draws. Raises ValueError as `encode` does.
        """
        images = np.asarray(images_uint8)
        if images.dtype != np.uint8:
            raise UserError(f"images are {images.dtype}; expected uint8 in 0..255")
        noisy = dequantise(key, jnp.asarray(images))
        return bits_per_dim(self.log_prob(noisy, labels), self.config.num_dims)

    def denoise(
        self, images: Any, labels: Any = None, noise_std: float | None = None, multiplier: float = 1.0
    ) -> jax.Array:
        """Tweedie's formula, x + s σ² ∇ log p(x | label): float32 [B, H, W, K].

        Args:
          images: float [B, H, W, K]. labels: int [B], -1 for no class, or None.
          noise_std: σ; None is the one the model was trained with. multiplier: s; 1 is the theory.

        Raises:
          ValueError: the model was not trained with Gaussian noise, or as `encode`.
        """
        std = self.noise_std if noise_std is None else noise_std
        if std is None or (self.noise is not None and self.noise_std is None):
            kind = self.noise.kind if self.noise else "unknown"
            raise UserError(
                f"denoising needs a model trained with gaussian noise, this one's was {kind}; "
                + ("pass noise_std if you know it" if self.noise is None else "sample without denoising")
            )
        images, labels = check_images(self.config, images), check_labels(self.config, labels, len(images))
        return self._parts.run(
            self._denoise,
            self.variables,
            images,
            labels,
            jnp.float32(std),
            jnp.float32(multiplier),
            bytes_per_image=backward_bytes(self._denoiser),
        )

    def sample(
        self,
        key: jax.Array,
        num_images: int,
        labels: Any = None,
        guidance: Guidance | None = None,
        denoise: bool | None = None,
        denoise_multiplier: float = 1.0,
        decoder: DecoderChoice = None,
    ) -> jax.Array:
        """Draws images.

        Args:
          key: of the latents; the same key gives the same images, however they are split into batches.
          num_images: B.
          labels: int [B], -1 for no class; None for no class anywhere.
          guidance: see `Guidance`.
          denoise: apply `denoise` to what was drawn; None does so for models trained with Gaussian noise.
          denoise_multiplier: see `denoise`.
          decoder: see `decode`.

        Returns:
          float32 [B, H, W, K], around [-1, 1] but not clipped to it.

        Raises:
          ValueError: as `decode` and `denoise`.
        """
        if denoise is None:
            denoise = self.noise_std is not None
        if denoise and self.noise_std is None:
            self.denoise(jnp.zeros((1, *self.config.image_shape)))  # says why not
        images = self.decode(self.latents(key, num_images), labels, guidance, decoder=decoder)
        return self.denoise(images, labels, multiplier=denoise_multiplier) if denoise else images

    def latents(self, key: jax.Array, num_images: int) -> jax.Array:
        """Standard normal latents [num_images, H, W, K], as `sample` draws them."""
        return jax.random.normal(key, (num_images, *self.config.image_shape), jnp.float32)


def _full_precision(config: TarFlowConfig, function: Callable[..., Any]) -> Callable[..., Any]:
    """float32 means float32: TPUs and recent GPUs multiply it in fewer bits unless told."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with jax.default_matmul_precision("highest" if config.dtype == "float32" else "default"):
            return function(*args, **kwargs)

    return wrapped
