"""The high-level API: a trained TarFlow to encode, decode, score, denoise and sample with."""

import contextlib
import dataclasses
import functools
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from tarflow_jax import interop, programs
from tarflow_jax.arguments import (
    DecoderChoice,
    check_decoder,
    check_guidance,
    check_images,
    check_labels,
    check_levels,
    check_number,
    is_traced,
)
from tarflow_jax.errors import UserError
from tarflow_jax.evaluation.bits_per_dim import image_bits_per_dim
from tarflow_jax.fingerprint import fingerprint
from tarflow_jax.flow import TarFlowConfig
from tarflow_jax.noise import Noise, to_float
from tarflow_jax.runtime import BatchRunner
from tarflow_jax.runtime.batches import DEFAULT_MEMORY_BOUND
from tarflow_jax.sampling import Guidance, IterativeDenoising, Schedule, Sequential
from tarflow_jax.sampling.iterative import DEFAULT_DENOISING
from tarflow_jax.sampling.memory import backward_bytes, decode_bytes, forward_bytes
from tarflow_jax.training.workdir import read_workdir

logger = logging.getLogger(__name__)
FAR_OUTSIDE = 4.0  # of images in [-1, 1]


@functools.cache
def _warn_of_range() -> None:  # once a process
    logger.warning("images reach far outside [-1, 1]; 8-bit values v are v / 127.5 - 1")


class TarFlowPipeline:
    """A trained flow. Every method is compiled once in a process for each model's and each batch's shape.

    The methods may be used within `jax.jit`, `jax.grad` and `jax.vmap`: of traced images or labels they compute at once
    and whole, with no split into batches.

    A batch too large for `memory_bound` is split into equal ones, the last one padded, so that a ragged batch
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
        schedule: Schedule | epath.PathLike | None = None,
        mesh: Mesh | None = None,
        memory_bound: int = DEFAULT_MEMORY_BOUND,
    ) -> None:
        """Wraps variables.

        Args:
          config: the model's shape. variables: of that shape. noise: of its training.
          ema_params: the parameters' average, used instead of the raw ones, which are kept to be saved beside it.
          card: what a saved model's card tells, see `interop.save_model`.
          schedule: what `decoder="auto"` uses, or the folder that holds it, where it is looked for at its first use.
          mesh: devices to spread over (`tarflow_jax.runtime.make_mesh`); None is the default device.
          memory_bound: bytes that a batch's activations may take, on all devices together.
        """
        self.config, self.noise = config, noise
        self._schedule, self._card, self._raw_params = schedule, card, None
        if ema_params is not None:
            self._raw_params = variables["params"]
            variables = {**variables, "params": ema_params}
        self._runner = BatchRunner(mesh, memory_bound)
        self.variables = self._runner.place(dict(variables))
        # On a CPU computing activations again is faster than keeping them.
        keep_all = dataclasses.replace(config, remat="none")
        recompute = self._runner.on_cores or backward_bytes(keep_all) > memory_bound // 8
        self._denoiser = dataclasses.replace(config, remat="full" if recompute else "none")

    def __repr__(self) -> str:
        config, devices = self.config, {str(device) for device in jax.tree.leaves(self.variables)[0].devices()}
        shape = f"{'x'.join(map(str, config.image_shape))}, {config.patch_size}-{config.width}-{config.depths}"
        noise = "unknown" if self.noise is None else str(self.noise)
        number = sum(leaf.size for leaf in jax.tree.leaves(self.variables["params"]))
        return (
            f"TarFlowPipeline({shape}, {config.num_classes or 'no'} classes, noise {noise}, {number:,} parameters on "
            f"{', '.join(sorted(devices))})"
        )

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, whose weights are on the host until they are opened again."""
        if self._runner.mesh is not None:
            raise UserError("a pipeline on a mesh is not copied or pickled; save_pretrained, and open it again")
        host = jax.device_get((self.variables, self._raw_params))
        return {**self.__dict__, "variables": host[0], "_raw_params": host[1], "_runner": self._runner.memory_bound}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._runner = BatchRunner(None, state["_runner"])
        self.variables = self._runner.place(state["variables"])

    @property
    def noise_std(self) -> float | None:
        """σ of the Gaussian noise in what is drawn; None for a model trained otherwise.

        That of the training, or the highest of its levels.
        """
        if self.noise is None or self.noise.kind == "uniform":
            return None
        return self.noise.std_max if self.noise.kind == "levels" else self.noise.std

    @property
    def drawn_level(self) -> float | None:
        """`noise_std` for a flow that is conditional on it, as `decode` takes it; None for one of a single level."""
        return self.noise_std if self.config.noise_conditional else None

    @functools.cached_property
    def schedule(self) -> Schedule | None:
        """What `decoder="auto"` uses, None for sequential decoders; ValueError if it is of other weights than these."""
        found = self._schedule
        if found is not None and not isinstance(found, Schedule):
            found = Schedule.read(found, self.config.num_blocks)
        if found is not None:
            found.check_weights(self.variables)
        return found

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
            return cls(
                run.config,
                run.variables,
                run.noise,
                ema_params=run.ema_params,
                card=run.card,
                schedule=workdir,
                **options,
            )
        if best:
            raise UserError(f"{name} is no training workdir; only these have a best checkpoint")
        saved = interop.load_model(name)
        return cls(saved.config, saved.variables, saved.noise, ema_params=saved.ema_params, schedule=name, **options)

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

        `card` is added to what is known of the run: its samples, and what launch.evaluate has measured of these
        weights. The average and the raw parameters are both kept. The decoder schedule and the measured figures go with
        weights that they are of: not with those that bfloat16 rounds.
        """
        card = {**(self._card or {}), **(card or {})}
        if found := card.get("evaluations"):
            mine = fingerprint(self.variables) if dtype == "float32" else None
            card["evaluations"] = [each for each in found if each["protocol"].get("fingerprint") == mine]
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
            card=card,
        )
        with contextlib.suppress(UserError):  # an unusable schedule
            if dtype == "float32" and self.schedule:
                self.schedule.write(Path(folder))

    def push_to_hub(self, name: str, *, private: bool = False, token: str | None = None, **options: Any) -> str:
        """Saves the model to the Hugging Face hub as "owner/name", which is made if it is missing.

        Args:
          private: of a model that is made. token: None is the one that `hf auth login` or HF_TOKEN gave.
          options: `dtype` and `card`, see `save_pretrained`.

        Returns:
          The commit's address.

        Raises:
          ValueError: no such name, or the hub refused. ImportError: huggingface_hub is not installed.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **options | {"card": {"name": name, **(options.get("card") or {})}})
            return interop.push_model(folder, name, private=private, token=token)

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

    def decode(
        self,
        latents: Any,
        labels: Any = None,
        guidance: Guidance | None = None,
        return_trajectory: bool = False,
        decoder: DecoderChoice = None,
        return_statistics: bool = False,
        noise_std: Any = None,
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
          noise_std: as of `encode`; samples are drawn at the highest level, `drawn_level`.

        Returns:
          float32 images [B, H, W, K]; if more is asked for, a tuple with the trajectory [F + 1, B, H, W, K] and
          (iterations, residual), int32 and float32 [F, B] by block number, behind it.

        Raises:
          ValueError: a shape, dtype or label that does not fit the model, class guidance of an unconditional one, not
            one decoder a block, or "auto" with other weights or guidance than were tuned.
        """
        guidance = check_guidance(self.config, guidance)
        schedule = self.schedule if decoder == "auto" else None
        decoders = check_decoder(self.config, schedule, decoder, guidance, len(latents))
        one_by_one = decoders is None or Sequential() in decoders
        program = functools.partial(programs.decode, self.config, trajectory=return_trajectory, decoders=decoders)
        decoded = self._run(
            program,
            latents,
            labels,
            check_levels(self.config, noise_std, len(latents)),
            guidance,
            bytes_per_image=decode_bytes(self.config, guided=guidance is not None, parallel=decoders is not None),
            # For one image XLA's CPU code copies the caches at every token; for two it does not.
            smallest=2 if self._runner.on_cores and one_by_one else 1,
        )
        results = [decoded.images]
        if return_trajectory:
            results.append(jnp.moveaxis(decoded.trajectory, 1, 0))
        if return_statistics:
            results.append((decoded.iterations.T, decoded.residual.T))
        return tuple(results) if results[1:] else decoded.images

    def log_prob(self, images: Any, labels: Any = None, noise_std: Any = None) -> jax.Array:
        """log p(x | label), float32 [B], nats; arguments and errors as of `encode`."""
        images = check_images(self.config, images)
        if not is_traced(images) and jnp.abs(images).max() > FAR_OUTSIDE:
            _warn_of_range()
        program = functools.partial(programs.log_prob, programs.exact(self.config))
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
    ) -> jax.Array:
        """Tweedie's formula, x + s σ² ∇ log p(x | label), or steps of it: float32 [B, H, W, K].

        Args:
          images: float [B, H, W, K]. labels: int [B], -1 for no class, or None.
          noise_std: σ; None is the one the model was trained with. A flow of many levels must be told (a number, or for
            a single step one for each image).
          multiplier: s of a single step; 1 is the theory.
          method: the steps, for a flow of many noise levels; None is a single one.
          key: of the noise that a method of kind "sde" draws.

        Raises:
          ValueError: the model was not trained with Gaussian noise, a method without levels, or as `encode`.
        """
        if method is not None:
            return self._iterate(images, labels, noise_std, method, key)
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

    def _iterate(
        self, images: Any, labels: Any, noise_std: Any, method: IterativeDenoising, key: jax.Array | None
    ) -> jax.Array:
        """`denoise` by steps."""
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
        program = dataclasses.replace(method, num_steps=1, std_min=None)  # the numbers are traced
        return self._run(
            functools.partial(programs.iterate, self._denoiser, method=program),
            images,
            labels,
            keys,
            check_number("noise_std", noise_std, least=1e-6),
            jnp.int32(method.num_steps),
            check_number("std_min", std_min),
            bytes_per_image=backward_bytes(self._denoiser),
        )

    def sample(
        self,
        key: jax.Array,
        num_images: int,
        labels: Any = None,
        guidance: Guidance | None = None,
        denoise: bool | IterativeDenoising | None = None,
        denoise_multiplier: float = 1.0,
        decoder: DecoderChoice = None,
    ) -> jax.Array:
        """Draws images.

        Args:
          key: of the latents; the same key gives the same images, however they are split into batches.
          num_images: B.
          labels: int [B], -1 for no class; None for no class anywhere.
          guidance: see `Guidance`.
          denoise: apply `denoise` to what was drawn; None does so for models trained with Gaussian noise. Flows of many
            levels do so by `IterativeDenoising`, which may be given in place of True.
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
        latents = self.latents(key, num_images)
        images = self.decode(latents, labels, guidance, decoder=decoder, noise_std=self.drawn_level)
        if not denoise:
            return images
        method = denoise if isinstance(denoise, IterativeDenoising) else None
        return self.denoise_drawn(images, labels, denoise_multiplier, method, jax.random.fold_in(key, 1))

    def denoise_drawn(
        self,
        images: jax.Array,
        labels: Any = None,
        multiplier: float = 1.0,
        method: IterativeDenoising | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """`denoise` for what `decode` drew: by one step; of many levels by `method`, None for the default."""
        if method is None and self.config.noise_conditional:
            method = DEFAULT_DENOISING
        return self.denoise(images, labels, self.drawn_level, multiplier, method, key)

    def latents(self, key: jax.Array, num_images: int) -> jax.Array:
        """Standard normal latents [num_images, H, W, K], as `sample` draws them."""
        if num_images < 1:
            raise UserError(f"num_images is {num_images}; expected a positive number")
        return jax.random.normal(key, (num_images, *self.config.image_shape), jnp.float32)

    def _run(
        self, program: functools.partial, images: Any, labels: Any, of_image: Any, *args: Any, **options: Any
    ) -> Any:
        """One of `programs` on images and labels that are checked first; options as of `BatchRunner.run`.

        `of_image` is what else each image has of its own, an array [B, …] or None.
        """
        images, labels = check_images(self.config, images), check_labels(self.config, labels, len(images))
        if is_traced((images, labels, of_image, args)):
            return program(self.variables, images, labels, of_image, *args)
        name = program.func.__name__.strip("_")
        rows = (images, labels, of_image)
        results = self._runner.run(program, self.variables, rows, *args, description=name, **options)
        return jax.tree.map(jnp.asarray, results)
