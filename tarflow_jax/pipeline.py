"""The high-level API: a trained TarFlow to encode, decode, score, denoise and sample with."""

import dataclasses
import functools
import logging
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from tarflow_jax import interop, likelihood, sampling
from tarflow_jax.data.sequences import lengths_of
from tarflow_jax.errors import UserError
from tarflow_jax.evaluation.bits_per_dim import image_bits_per_dim
from tarflow_jax.files import is_remote
from tarflow_jax.flow import TarFlow, TarFlowConfig
from tarflow_jax.interop import SavedModel
from tarflow_jax.noise import Noise, to_float
from tarflow_jax.options import checked, shown
from tarflow_jax.runtime import BatchRunner, device_flow, exact
from tarflow_jax.runtime.batch_runner import DEFAULT_MEMORY_BOUND, backward_bytes, forward_bytes
from tarflow_jax.runtime.parameters import variables_shapes
from tarflow_jax.sampling import (
    DEFAULT_DENOISING,
    Decoded,
    Decoder,
    GaussSeidelJacobi,
    Guidance,
    IterativeDenoising,
    Jacobi,
    Schedule,
    Sequential,
    Student,
    Tuned,
)
from tarflow_jax.student import Student as StudentNetwork
from tarflow_jax.student import StudentConfig, TrainedStudent
from tarflow_jax.training.workdir import read_student, read_workdir

FAR_OUTSIDE = 4.0  # absolute value beyond which images seem not to be scaled to [-1, 1]
MUCH = 1.25  # factor beyond the noise levels of training that draws a warning
logger = logging.getLogger(__name__)

DecoderChoice = Decoder | Tuned | Sequence[Decoder] | None


class TarFlowPipeline:
    """A trained flow. Each method compiles once per process for each shape of model and batch.

    Methods work inside `jax.jit`, `jax.grad`, `jax.jvp` and `jax.vmap`: traced images, labels or guidance weights run
    as a single batch, without checks of their values.

    A batch too large for `memory_bound` is split into equal ones, the last one padded, so that a ragged batch does
    not recompile. Likelihoods are float32 at full matmul precision; the rest runs in `config.dtype`.

    Attributes:
      config: the model's shape.
      variables: the parameters in use (averaged, if an average was kept) and, in VP mode, the prior.
      noise: the training noise; None if unknown.
      card: fields of the model card, see `interop.model_card`; {} for a saved model.
      label_names: names of the classes; () if unknown.
    """

    def __init__(
        self,
        config: TarFlowConfig,
        variables: Mapping[str, Any],
        noise: Noise | None = None,
        *,
        ema_params: Mapping[str, Any] | None = None,
        card: Mapping[str, Any] | None = None,
        label_names: Sequence[str] = (),
        schedule: Schedule | epath.PathLike | None = None,
        student: TrainedStudent | epath.PathLike | None = None,
        mesh: Mesh | None = None,
        memory_bound: int = DEFAULT_MEMORY_BOUND,
    ) -> None:
        """Wraps variables.

        Args:
          config: the model's shape.
          variables: of that shape.
          noise: the training noise.
          ema_params: averaged parameters, used instead of the raw ones; `save_pretrained` keeps both.
          card: fields of the model card, see `interop.model_card`.
          label_names: names of the classes.
          schedule: for `Tuned()`, or the folder to read it from on first use.
          student: for `Student()`, or the folder to read it from on first use.
          mesh: devices to run on (`tarflow_jax.runtime.make_mesh`); None is the default device.
          memory_bound: bytes that a batch's activations may take, on all devices together.
        """
        config, noise = checked("config", config, TarFlowConfig), checked("noise", noise, Noise | None)
        self.config, self.noise = config, noise
        self.card: Mapping[str, Any] = card or {}
        self.label_names = tuple(label_names)
        self._schedule, self._student, self._raw_params = schedule, student, None
        variables = check_variables(config, variables)
        if ema_params is not None:
            self._raw_params = variables["params"]
            variables = check_variables(config, {**variables, "params": ema_params})
        self._runner = BatchRunner(mesh, checked("memory_bound", memory_bound, int, low=1))
        self.variables = self._runner.place(variables)
        # On CPU, recomputing activations is faster than keeping them.
        keep_all = dataclasses.replace(config, remat="none")
        recompute = self._runner.on_cores or backward_bytes(keep_all) > memory_bound // 8
        self._denoiser = dataclasses.replace(config, remat="full" if recompute else "none")

    def __repr__(self) -> str:
        config, devices = self.config, {str(device) for device in jax.tree.leaves(self.variables)[0].devices()}
        patch = "" if config.is_sequence else f"{config.patch_size}-"
        shape = f"{'x'.join(map(str, config.data_shape))}, {patch}{config.width}-{config.depths}"
        noise = self.noise or ("none" if config.is_sequence else "unknown")
        number = sum(leaf.size for leaf in jax.tree.leaves(self.variables["params"]))
        return (
            f"{type(self).__name__}({shape}, {config.num_classes or 'no'} classes, noise {noise}, "
            f"{number:,} parameters on {', '.join(sorted(devices))})"
        )

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state of a copy or pickle, whose weights are on the host until it is unpickled."""
        if self._runner.mesh is not None:
            raise UserError("a pipeline on a mesh is not copied or pickled; save_pretrained, and open it again")
        host = jax.device_get((self.variables, self._raw_params))
        return {**self.__dict__, "variables": host[0], "_raw_params": host[1], "_runner": self._runner.memory_bound}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._runner = BatchRunner(None, state["_runner"])
        self.variables = self._runner.place(state["variables"])

    # Loading and saving

    @classmethod
    def from_pretrained(cls, name: epath.PathLike, *, best: bool = False, **options: Any) -> Self:
        """Loads a training workdir, a saved model's folder, a ready-made model, or one of the hub ("owner/name").

        Args:
          name: a folder, which may be in an object store (gs://), or one of `interop.READY_MADE`, such as "digits".
          best: load a workdir's checkpoint of the lowest test loss instead of its last one.
          options: `mesh` and `memory_bound`, see the constructor.

        Raises:
          FileNotFoundError: there is no model.
          ValueError: it is damaged, or not a model.
        """
        folder: epath.PathLike = epath.Path(interop.check_path(name))
        if (epath.Path(name) / "checkpoints").is_dir():
            saved = read_workdir(folder, options.get("mesh"), best=best)
        elif best:
            raise UserError(f"{name} is no training workdir; only these have a best checkpoint")
        else:
            folder = interop.local_folder(name)
            saved = interop.load_model(folder)
        options |= {"ema_params": saved.ema_params, "card": saved.card, "label_names": saved.label_names}
        options |= {"schedule": folder, "student": folder}
        return cls(saved.config, saved.variables, saved.noise, **options)

    @classmethod
    def from_torch(
        cls,
        path: str | Path,
        image_size: int | tuple[int, int],
        image_channels: int,
        patch_size: int,
        noise_std: float | None = None,
        base_size: int | None = None,
        orders: str | None = None,
        place: Callable[[Any], Any] | None = None,
        noise_std_min: float | None = None,
        **options: Any,
    ) -> Self:
        """Loads a state dict of a PyTorch reference: TarFlow, iTARFlow or STARFlow.

        See `interop.load_torch` for other arguments and errors.

        Args:
          noise_std: σ of the training noise, an iTARFlow's highest; None if unknown.
          noise_std_min: an iTARFlow's lowest σ, where its steps of denoising end; None if unknown.
          options: `mesh` and `memory_bound` of the constructor.
        """
        place = place or BatchRunner(options.get("mesh")).place
        config, variables = interop.load_torch(
            path, image_size, image_channels, patch_size, base_size, orders, place=place
        )
        noise = None if noise_std is None else Noise("gaussian", noise_std)
        if noise_std_min is not None:
            if not config.noise_conditional:
                raise UserError("noise_std_min is given, but this model is of one noise level; leave it out")
            noise = Noise("levels", std_min=noise_std_min, std_max=noise_std or 0.0)
        return cls(config, variables, noise, **options)

    def to_torch(self, path: str | Path) -> None:
        """Writes a state dict that the PyTorch reference loads with strict=True; see `interop.save_torch`."""
        interop.save_torch(path, self.config, self.variables)

    def save_pretrained(
        self, folder: str | Path, *, dtype: str = "float32", card: Mapping[str, Any] | None = None
    ) -> None:
        """Writes config.json, model.safetensors and a model card; see `interop.save_model`.

        Keeps both the averaged and the raw parameters. Measured figures, decoder schedule and student belong to the
        exact weights: they are left out if `dtype` is bfloat16, which rounds the weights.

        Args:
          card: fields to add to those of the run: its samples, and what launch.evaluate measured with these weights.
        """
        if is_remote(interop.check_path(folder)):
            with tempfile.TemporaryDirectory() as local:
                interop.copy_model(folder, local)  # so that what is there is replaced, or refused, as on a disk
                try:
                    self.save_pretrained(local, dtype=dtype, card=card)
                except UserError as error:
                    raise UserError(str(error).replace(local, os.fspath(folder))) from error
                interop.copy_model(local, folder)
            return
        variables, ema_params = self.variables, None
        if self._raw_params is not None:
            variables, ema_params = {**variables, "params": self._raw_params}, variables["params"]
        card = {**self.card, **(card or {})}
        saved = SavedModel(self.config, variables, self.noise, ema_params, card, self.label_names)
        student, schedule = self._unless_stale("student"), self._unless_stale("schedule")  # may be read from `folder`
        interop.save_model(folder, saved, dtype=dtype, student=student)
        if dtype == "float32" and schedule:
            schedule.write(Path(folder))

    def push_to_hub(self, name: str, *, private: bool = False, token: str | None = None, **options: Any) -> str:
        """Saves the model to the Hugging Face hub as "owner/name", which is created if it is missing.

        Args:
          private: whether a new repository is private.
          token: None is the one of `hf auth login` or HF_TOKEN.
          options: `dtype` and `card`, see `save_pretrained`.

        Returns:
          The commit's URL.

        Raises:
          ValueError: an invalid name, or the hub refused.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **options | {"card": {"name": name, **(options.get("card") or {})}})
            return interop.push_model(folder, name, private=private, token=token)

    def _unless_stale(self, name: str) -> Any:
        """Returns the schedule or student, or None, with a warning, if it belongs to other weights."""
        try:
            return getattr(self, name)
        except UserError as error:
            logger.warning("the %s is left out: %s", name, error)
            return None

    # Noise, decoder schedule and student

    @property
    def noise_std(self) -> float | None:
        """σ of the Gaussian noise in samples: that of the training, or its highest level; None for other noise."""
        if self.noise is None or self.noise.kind == "uniform":
            return None
        return self.noise.std_max if self.noise.kind == "levels" else self.noise.std

    @property
    def drawn_level(self) -> float | None:
        """Noise level of a noise-conditional flow's samples, for `decode`; None for other flows."""
        return self.noise_std if self.config.noise_conditional else None

    @functools.cached_property
    def schedule(self) -> Schedule | None:
        """The decoders of `Tuned()`, or None; raises ValueError if they were tuned for other weights."""
        found = self._schedule
        if found is not None and not isinstance(found, Schedule):
            found = Schedule.read(found, self.config.num_blocks)
        if found is not None:
            found.check_weights(self.variables)
        return found

    @functools.cached_property
    def student(self) -> TrainedStudent | None:
        """The network of `Student()`, or None; raises ValueError if it was trained for other weights."""
        found = self._student
        if found is not None and not isinstance(found, TrainedStudent):
            in_workdir = (epath.Path(found) / "checkpoints").is_dir()
            found = read_student(found, self._runner.mesh) if in_workdir else interop.load_student(found)
        if found is None:
            return None
        found.check_flow(self.variables)
        return dataclasses.replace(found, variables=self._runner.place(found.variables))

    # Density

    def encode(
        self, images: Any, labels: Any = None, noise_std: Any = None, condition: Any = None, mask: Any = None
    ) -> tuple[jax.Array, jax.Array]:
        """Encodes images or sequences as latents.

        Args:
          images: float [B, H, W, K] in [-1, 1], or sequences [B, T, D] or [B, T] in their own units.
          labels: int [B], -1 for no class; None is all -1.
          noise_std: σ of the images, a number or [B]; only for a noise-conditional flow.
          condition: float [B, C], [B, T, C] with one per token, or a prefix [B, L, C]; None for none.
          mask: bool [B, T], True for tokens and False for padding, or the lengths, int [B]; None without padding.

        Returns:
          (latents, log_det): float32, shaped as `images`, standard normal under the model; and float32 [B], nats.

        Raises:
          ValueError: a shape, dtype, label, noise level, condition or mask that does not fit the model.
        """
        return self._density(likelihood.encode, self.config, images, labels, noise_std, condition, mask)

    def log_prob(
        self, images: Any, labels: Any = None, noise_std: Any = None, condition: Any = None, mask: Any = None
    ) -> jax.Array:
        """Returns log p(x | label, condition), float32 [B], nats; arguments and errors are those of `encode`."""
        return self._density(likelihood.log_prob, exact(self.config), images, labels, noise_std, condition, mask)

    def patch_log_prob(self, images: Any, labels: Any = None, noise_std: Any = None) -> jax.Array:
        """Returns each patch's share of log p(x | label), float32 [B, H / P, W / P], nats; they add up to `log_prob`.

        `likelihood.patch_log_prob` explains what a share means. Arguments and errors are those of `encode`.
        """
        self._require_images("patch_log_prob")
        return self._density(likelihood.patch_log_prob, exact(self.config), images, labels, noise_std)

    def _density(self, function: Any, config: TarFlowConfig, images: Any, *given: Any) -> Any:
        """Runs a function of `likelihood`; warns, once per process, if images seem not to be scaled to [-1, 1]."""
        rows = self._rows(images, *given)
        if not (config.is_sequence or is_traced(images)) and np.abs(np.asarray(images)).max() > FAR_OUTSIDE:
            _warn_once("images reach far outside [-1, 1]; 8-bit values v are v / 127.5 - 1")
        return self._run(function, config, rows)

    def bits_per_dim(self, key: jax.Array, images_uint8: Any, labels: Any = None, noise_std: Any = None) -> jax.Array:
        """Returns bits per dimension, float32 [B], of uint8 or uint16 images [B, H, W, K], dequantised uniformly.

        This is an upper bound in expectation over the noise that `key` draws. A noise-conditional flow is evaluated at
        `noise_std`, a number. Raises ValueError as `encode` does.
        """
        self._require_images("bits_per_dim")
        images = np.asarray(images_uint8)
        if images.dtype != f"uint{self.config.image_bits}":
            raise UserError(f"images are {images.dtype}; expected uint{self.config.image_bits}")
        check_images(self.config, to_float(images))
        labels = check_labels(self.config, labels, len(images))
        levels = jax.device_get(check_levels(self.config, noise_std, 1))
        check_key(key)
        with np.errstate(invalid="ignore"):
            bits = image_bits_per_dim(self._runner, self.config, self.variables, (images, labels), key, levels=levels)
        check_finite("bits_per_dim", bits)
        return jnp.asarray(bits, jnp.float32)

    # Denoising

    def denoise(
        self,
        images: Any,
        labels: Any = None,
        noise_std: Any = None,
        multiplier: float = 1.0,
        method: IterativeDenoising | None = None,
        key: jax.Array | None = None,
        return_trajectory: bool = False,
        condition: Any = None,
        mask: Any = None,
    ) -> Any:
        """Denoises by Tweedie's formula, x + s σ² ∇ log p(x | label), in one or several steps: float32 [B, H, W, K].

        Args:
          images: float [B, H, W, K].
          labels: int [B], -1 for no class, or None.
          noise_std: σ; None is that of training. Required for a noise-conditional flow: a number or, for a single
            step, also [B].
          multiplier: s of a single step; 1 gives the posterior mean.
          method: the steps, for a noise-conditional flow; None is a single step.
          key: for the noise of a method of kind "sde".
          return_trajectory: also return the images before and after each of the method's N steps, [N + 1, B, H, W, K].
          condition: see `encode`.
          mask: see `encode`.

        Raises:
          ValueError: the model was not trained with Gaussian noise, or has no noise levels for a method, or the method
            starts below its lowest level; or as in `encode`.
        """
        method = checked("method", method, IterativeDenoising | None)
        if method is not None:
            if is_traced(multiplier) or multiplier != 1:
                raise UserError(f"multiplier is {shown(multiplier)}; expected 1 with a method, whose steps have none")
            path = self._denoise_in_steps(images, labels, noise_std, method, key, return_trajectory, condition, mask)
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
        rows = self._rows(images, labels, noise_std if self.config.noise_conditional else None, condition, mask)
        if not self.config.noise_conditional:
            rows["noise_std"] = jnp.full(len(rows["images"]), check_number("noise_std", std, low=0))
        return self._run(
            sampling.denoise,
            self._denoiser,
            rows,
            bytes_per_image=backward_bytes(self._denoiser),
            multiplier=check_number("multiplier", multiplier),
        )

    def denoise_drawn(
        self,
        images: jax.Array,
        labels: Any = None,
        multiplier: float = 1.0,
        method: IterativeDenoising | None = None,
        key: jax.Array | None = None,
        return_trajectory: bool = False,
        condition: Any = None,
        mask: Any = None,
    ) -> Any:
        """Denoises what `decode` drew by `method`; None is one step, for images at many levels several."""
        if method is None and self.config.noise_conditional and self.config.image_bits:
            method = DEFAULT_DENOISING
        return self.denoise(
            images, labels, self.drawn_level, multiplier, method, key, return_trajectory, condition, mask
        )

    def _denoise_in_steps(
        self,
        images: Any,
        labels: Any,
        noise_std: Any,
        method: IterativeDenoising,
        key: jax.Array | None,
        trajectory: bool,
        condition: Any,
        mask: Any,
    ) -> jax.Array:
        """Returns the denoised images, or their trajectory."""
        if not self.config.noise_conditional:
            raise UserError("iterative denoising needs a model of many noise levels; this one is of a single level")
        std_min = method.std_min or (self.noise and self.noise.std_min)
        if not std_min:
            raise UserError("the lowest noise level of this model is not known; give IterativeDenoising a std_min")
        if noise_std is None or np.ndim(noise_std):
            raise UserError(f"noise_std is {shown(noise_std)}; expected one number, the level that the steps begin at")
        rows = self._rows(images, labels, check_number("noise_std", noise_std, low=1e-6), condition, mask)
        if method.num_steps > 1 and not is_traced(noise_std) and np.float32(noise_std) < np.float32(std_min):
            raise UserError(f"noise_std is {noise_std:g}; expected at least std_min, {std_min:g}, where the steps end")
        if method.kind == "sde":
            if key is None:
                raise UserError("a method of kind 'sde' draws noise; give denoise a key")
            rows["key_data"] = jax.random.key_data(jax.random.split(check_key(key), len(rows["images"])))
        # All numbers are traced, except how many images a trajectory holds.
        static = dataclasses.replace(method, num_steps=method.num_steps if trajectory else 1, std_min=None)
        found = self._run(
            functools.partial(sampling.iterate, method=static, trajectory=trajectory),
            self._denoiser,
            rows,
            bytes_per_image=backward_bytes(self._denoiser),
            num_steps=jnp.int32(method.num_steps),
            std_min=jnp.float32(std_min),
        )
        return jnp.concatenate([jnp.asarray(images)[None], jnp.moveaxis(found, 1, 0)]) if trajectory else found

    # Sampling

    def decode(
        self,
        latents: Any,
        labels: Any = None,
        guidance: Guidance | None = None,
        decoder: DecoderChoice = None,
        noise_std: Any = None,
        condition: Any = None,
        mask: Any = None,
        null_condition: Any = None,
    ) -> jax.Array:
        """Decodes latents to images. Without guidance this is the exact inverse of `encode`, except by a `Student`.

        Args:
          latents: float [B, H, W, K], standard normal for samples.
          labels: int [B], -1 for no class; None is all -1.
          guidance: see `Guidance`; None or weight 0 for none.
          decoder: None is `Sequential()`, which is exact. Others are `Jacobi()`, `GaussSeidelJacobi(…)`, or one of
            these for each block, by block number; `Tuned()`, what launch.tune_decoder found; and `Student()`, which
            makes clean images in one pass and is not the inverse.
          noise_std: see `encode`; samples are drawn at the highest level, `drawn_level`.
          condition: see `encode`.
          mask: see `encode`.
          null_condition: what guidance pushes away from instead of the model's own null condition, such as the
            embeddings of the empty text; shaped as `condition`, or without the batch axis.

        Returns:
          float32 [B, H, W, K].

        Raises:
          ValueError: a shape, dtype or label that does not fit the model, class guidance of an unconditional one, not
            one decoder per block, `Tuned()` with other weights or guidance, or no student of these weights.
        """
        return self._decode(
            sampling.decode, latents, labels, guidance, decoder, noise_std, condition, mask, null_condition
        )

    def decode_trace(
        self,
        latents: Any,
        labels: Any = None,
        guidance: Guidance | None = None,
        decoder: DecoderChoice = None,
        noise_std: Any = None,
        condition: Any = None,
        mask: Any = None,
        null_condition: Any = None,
    ) -> Decoded:
        """Decodes, and returns the trajectory and statistics too; arguments and errors are those of `decode`.

        The clean images of `Student()` are not an inverse, so they have no log_det, updates or residuals; their
        trajectory ends with the noisy images.
        """
        return self._decode(
            sampling.decode_trace, latents, labels, guidance, decoder, noise_std, condition, mask, null_condition
        )

    def _decode(
        self, function: Any, latents: Any, labels: Any, guidance: Any, decoder: DecoderChoice, *given: Any
    ) -> Any:
        """Calls `sampling.decode`, `decode_trace` or `decode_log_prob`; `given` is what `_rows` takes after labels."""
        guidance = checked("guidance", guidance, Guidance | None)
        guidance = guidance and guidance.checked_for(self.config)
        if guidance and self._condition_required and given[-1] is None:
            raise UserError("guidance needs a flow fitted with drop_condition, or a null_condition")
        if isinstance(decoder, Student) and not decoder.polish:
            weight = check_student_guidance(self.require_student().config, guidance)
            images, path = self._by_student(latents, labels, weight)
            if function is sampling.decode:
                return images
            trajectory = jnp.concatenate([jnp.asarray(latents)[:, None], jnp.flip(path, 1)], axis=1)
            return Decoded(images, None, trajectory, None, None)
        rows = self._rows(latents, labels, *given, name="latents")
        decoders = self._decoders(decoder, guidance, len(rows["latents"]))
        if decoders and any(isinstance(one, Student) or getattr(one, "init", "") == "student" for one in decoders):
            most = self.require_student().config.max_guidance
            weight = jnp.clip(guidance.weight, 0, most) if guidance else 0.0
            _, rows["guess"] = self._by_student(latents, labels, weight)
        one_by_one = decoders is None or Sequential() in decoders
        slots = self.config.condition_length + self.config.num_tokens
        caches = max(self.config.depths) * 4 * 4 * slots * self.config.width  # float32 keys, values and their copies
        at_once = forward_bytes(self.config) if decoders else 0
        return self._run(
            functools.partial(function, decoders=decoders),
            self.config,
            rows,
            bytes_per_image=(caches + at_once) * (1 if guidance is None else 2),
            # For one image, XLA on CPU copies the caches at every token; for two it does not.
            smallest=2 if self._runner.on_cores and one_by_one else 1,
            guidance=guidance,
        )

    def _decoders(
        self, decoder: DecoderChoice, guidance: Guidance | None, batch_size: int
    ) -> tuple[Decoder, ...] | None:
        """Returns one decoder per block; None if all are sequential."""
        if isinstance(decoder, Tuned):
            if is_traced(guidance):
                raise UserError("Tuned() holds for one guidance, and this one is traced; name a decoder")
            return self.schedule.checked_for(guidance).of(batch_size) if self.schedule else None
        if decoder is None or decoder == Sequential():
            return None
        kinds = Sequential | Jacobi | GaussSeidelJacobi
        most = max(self.config.sequence_length - 1, 1)  # steps after which every token is exact
        for one in decoder if isinstance(decoder, Sequence) else (decoder,):
            if (number := getattr(one, "num_segments", getattr(one, "polish", 0))) > most:
                raise UserError(f"decoder is {one}; {number} is too many, expected at most {most} for this model")
        if isinstance(decoder, kinds | Student):
            return (decoder,) * self.config.num_blocks
        if isinstance(decoder, str) or not isinstance(decoder, Sequence):
            raise UserError(f"decoder is {shown(decoder)}; expected a decoder, as Jacobi(), or one for each block")
        if len(decoder) != self.config.num_blocks:
            raise UserError(
                f"{len(decoder)} decoders are given; expected one for each of {self.config.num_blocks} blocks"
            )
        if wrong := [one for one in decoder if not isinstance(one, kinds)]:
            raise UserError(f"decoder has {wrong[0]!r}; expected Sequential(), Jacobi(…) or GaussSeidelJacobi(…)")
        return tuple(decoder)

    def require_student(self) -> TrainedStudent:
        """Returns `student`; raises ValueError if there is none."""
        if self.student is None:
            raise UserError("this model has no student; train one with launch.distill, or name another decoder")
        return self.student

    def _by_student(self, latents: Any, labels: Any, weight: Any) -> tuple[jax.Array, jax.Array]:
        """Returns the student's clean images [B, H, W, K], and its trajectory [B, F, H, W, K] by block number."""
        student, latents = self.require_student(), check_images(self.config, latents, "latents")
        labels = check_labels(self.config, labels, len(latents))
        weights = jnp.full(len(latents), weight, jnp.float32)
        return self._run(
            _run_student,
            student.config,
            {"latents": latents, "labels": labels, "weights": weights},
            variables=student.variables,
            bytes_per_image=forward_bytes(student.config.shape),
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
        condition: Any = None,
        mask: Any = None,
        return_log_prob: bool = False,
        null_condition: Any = None,
    ) -> Any:
        """Draws images or sequences.

        Args:
          key: for the latents; the same key gives the same images, however they are split into batches.
          num_images: B.
          labels: int [B], -1 for no class; None is all -1.
          guidance: see `Guidance`.
          denoise: whether to apply `denoise_drawn`; None does so for models trained with Gaussian noise. A
            noise-conditional flow also takes the `IterativeDenoising` to use.
          denoise_multiplier: see `denoise`.
          decoder: see `decode`. The images of `Student()` are clean already.
          condition: see `encode`.
          mask: see `encode`.
          return_log_prob: also return log q of each sample, guidance included; needs denoise=False and no student.
          null_condition: see `decode`.

        Returns:
          float32 [B, H, W, K], around [-1, 1] but not clipped to it; or sequences [B, T, D] or [B, T]. With
          `return_log_prob` also float32 [B], nats.

        Raises:
          ValueError: as in `decode` and `denoise`.
        """
        checked("denoise", denoise, bool | IterativeDenoising | None)
        if decoder == Student():
            if denoise not in (None, True) or denoise_multiplier != 1:
                raise UserError("Student() gives clean images by itself; leave denoise out, or polish")
            return self.decode(self.latents(key, num_images), labels, guidance, decoder)
        if denoise is None:
            denoise = self.noise_std is not None
        if denoise and self.noise_std is None:
            self.denoise(jnp.zeros((1, *self.config.data_shape)))  # raises, with the reason
        latents, given = self.latents(key, num_images), (self.drawn_level, condition, mask, null_condition)
        if return_log_prob:
            if denoise or isinstance(decoder, Student):
                raise UserError("log q is of what the flow's inverse draws; sample with denoise=False and no student")
            return self._decode(sampling.decode_log_prob, latents, labels, guidance, decoder, *given)
        images = self.decode(latents, labels, guidance, decoder, *given)
        if not denoise:
            return images
        method, fresh = denoise if isinstance(denoise, IterativeDenoising) else None, jax.random.fold_in(key, 1)
        return self.denoise_drawn(images, labels, denoise_multiplier, method, fresh, condition=condition, mask=mask)

    def latents(self, key: jax.Array, num_images: int) -> jax.Array:
        """Draws the standard normal latents of `sample`, shaped as the model's images or sequences."""
        shape = (checked("num_images", num_images, int, low=1), *self.config.data_shape)
        return jax.random.normal(check_key(key), shape, jnp.float32)

    # Running

    @functools.cached_property
    def _condition_required(self) -> bool:
        """Whether the flow has not learned to do without its condition: what replaces it is as initialised, zero."""
        if not self.config.condition_dim or self.config.has_prefix or is_traced(self.variables):
            return False
        blocks = self.variables["params"].values()
        return not any(bool(jnp.any(block["null_condition"])) for block in blocks if "null_condition" in block)

    def _require_images(self, method: str) -> None:
        if self.config.is_sequence:
            raise UserError(f"{method} is of images, and this model of sequences; use log_prob")

    def _rows(
        self,
        images: Any,
        labels: Any,
        noise_std: Any,
        condition: Any = None,
        mask: Any = None,
        null_condition: Any = None,
        *,
        name: str = "images",
    ) -> dict[str, Any]:
        """Checks the arrays [B, …] of a call and returns them by argument name; `name` is that of the images."""
        images = check_images(self.config, images, name)
        levels = check_levels(self.config, noise_std, len(images))
        if levels is not None and self.noise is not None and self.noise.kind == "levels" and not is_traced(levels):
            low, high, given = self.noise.std_min, self.noise.std_max, np.asarray(levels)
            if ((given < low / MUCH) | (given > high * MUCH)).any():
                _warn_once(f"noise_std is far outside the levels of this flow's training, {low:g} to {high:g}")
        rows = {name: images, "labels": check_labels(self.config, labels, len(images)), "noise_std": levels}
        if condition is not None:
            rows["condition"] = check_condition(self.config, condition, len(images))
        elif self._condition_required:
            raise UserError(
                f"condition is missing; expected {(len(images), *self.config.condition_shape)}, "
                "since this flow was fitted without drop_condition"
            )
        if mask is not None:
            if not self.config.is_sequence:
                raise UserError("a mask is for sequences; this model is of images")
            rows["lengths"] = jnp.asarray(lengths_of(mask, len(images), self.config.num_tokens))
        if null_condition is not None:
            rows["null_condition"] = check_condition(self.config, null_condition, len(images), "null_condition")
        return rows

    def _run(
        self,
        function: Any,
        config: TarFlowConfig | StudentConfig,
        rows: Mapping[str, Any],
        *,
        variables: Any = None,
        bytes_per_image: int = 0,
        smallest: int = 1,
        **shared: Any,
    ) -> Any:
        """Calls a jitted function, in batches, or at once if anything is traced.

        Args:
          function: called with (flow, variables, **rows, **shared); a student's gets its config instead of the flow.
          config: of the flow or the student.
          rows: arrays [B, …] by argument name.
          variables: None is the flow's.
          bytes_per_image: of activations; 0 is those of a forward pass.
          smallest: smallest batch size.
        """
        variables = self.variables if variables is None else variables
        if is_traced((rows, shared, variables)):
            static = TarFlow(config) if isinstance(config, TarFlowConfig) else config  # differentiable in every mode
            with jax.default_matmul_precision("highest"):
                return function(static, variables, **rows, **shared)
        static = device_flow(config) if isinstance(config, TarFlowConfig) else config
        name = getattr(function, "func", function).__name__
        results = self._runner.run(
            functools.partial(function, static),
            variables,
            rows,
            bytes_per_image=bytes_per_image or forward_bytes(self.config),
            smallest=smallest,
            description=name,
            **shared,
        )
        check_finite(name, jax.tree.leaves(results)[0])
        return jax.tree.map(jnp.asarray, results)


@functools.partial(jax.jit, static_argnames="config")
def _run_student(
    config: StudentConfig, variables: Any, latents: jax.Array, labels: jax.Array | None, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return StudentNetwork(config, device_flow(config.shape).kernels).apply(variables, latents, labels, weights)


def check_student_guidance(config: StudentConfig, guidance: Guidance | None) -> float | jax.Array:
    """Returns the weight, 0 for None; raises ValueError for guidance that the student did not learn."""
    if guidance is None:
        return 0.0
    if is_traced(guidance.attention_temperature) or dataclasses.replace(guidance, weight=0.0) != Guidance():
        raise UserError(f"guidance is {guidance}; a student takes a weight alone, Guidance(weight=w)")
    if not is_traced(guidance.weight) and not 0 <= guidance.weight <= config.max_guidance:
        raise UserError(
            f"guidance weight is {guidance.weight}; this student learned 0 to {config.max_guidance:g} "
            "(student.max_guidance)"
        )
    return guidance.weight


def is_traced(tree: Any) -> bool:
    """Whether any array of a pytree is a tracer of `jax.jit`, `jax.grad` or `jax.vmap`, which has no values yet."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def check_variables(config: TarFlowConfig, variables: Any) -> dict[str, Any]:
    """Returns the variables; raises ValueError for the first one that is missing or of another shape."""
    tree = dict(checked("variables", variables, Mapping))
    found = {name: np.shape(leaf) for name, leaf in flatten_dict(tree, sep="/").items()}
    for name, shape in variables_shapes(config).items():
        if found.get(name) != shape:
            has = f"{name} of shape {found[name]}" if name in found else f"no {name}"
            raise UserError(f"variables have {has}; expected shape {shape} by this config")
    return tree


def check_number(name: str, value: Any, low: float = -math.inf) -> jax.Array:
    """Returns a float32 scalar; raises ValueError unless the value is one finite number, not below `low`."""
    if not isinstance(value, jax.core.Tracer) or value.ndim:
        value = checked(name, value, float, low=low)
    return jnp.asarray(value, jnp.float32)


def check_key(key: Any) -> jax.Array:
    """Returns the key; raises ValueError unless it is one key of `jax.random`."""
    try:
        jax.eval_shape(jax.random.bits, key)
    except (TypeError, ValueError):
        raise UserError(f"key is {shown(key)}; expected one key, jax.random.key(seed)") from None
    return key


def check_images(config: TarFlowConfig, images: Any, name: str = "images") -> jax.Array:
    """Returns float32 [B, H, W, K], [B, T, D] or [B, T]; raises ValueError for another shape, or for integers."""
    letters = ", ".join(("TD" if config.is_sequence else "HWK")[: len(config.data_shape)])
    try:
        array = jnp.asarray(images)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{name} are {shown(images)}; expected floats [B, {letters}]") from None
    if not jnp.issubdtype(array.dtype, jnp.floating):
        scale = f"{config.image_bits}-bit v is v / {(2**config.image_bits - 1) / 2} - 1"
        in_range = "" if config.is_sequence else f" in [-1, 1] ({scale})"
        raise UserError(f"{name} are {array.dtype}; expected floats{in_range}")
    if not array.ndim or array.shape[1:] != config.data_shape or not len(array):
        raise UserError(
            f"{name} have shape {array.shape}; expected [B, {letters}] = [B, "
            f"{', '.join(map(str, config.data_shape))}] with B >= 1"
        )
    return array.astype(jnp.float32)


def check_finite(name: str, results: np.ndarray) -> None:
    """Warns about results [B, …] that are NaN or infinite."""
    if bad := int((~np.isfinite(results).reshape(len(results), -1).all(1)).sum()):
        message = "%s: %d of %d results are not finite; the images or the weights are not, or guidance is too strong"
        logger.warning(message, name, bad, len(results))


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def check_labels(config: TarFlowConfig, labels: Any, batch_size: int) -> jax.Array | None:
    """Returns int32 [B], or None without labels or classes; raises ValueError for labels that are not classes."""
    if labels is None:
        return None
    traced, classes = is_traced(labels), config.num_classes
    try:
        array = labels if traced else np.asarray(labels)
    except ValueError:
        raise UserError(f"labels are {shown(labels)}; expected whole numbers of shape ({batch_size},)") from None
    if not np.issubdtype(array.dtype, np.integer) or array.shape != (batch_size,):
        raise UserError(f"labels are {array.dtype} {array.shape}; expected whole numbers of shape ({batch_size},)")
    wrong = [] if traced else array[(array < -1) | (array >= classes)]
    if len(wrong):
        valid = f"-1 (no class) to {classes - 1}" if classes else "-1 or None, the model has no classes"
        raise UserError(f"label {wrong[0]} is out of range; expected {valid}")
    return jnp.asarray(array, jnp.int32) if classes else None


def check_condition(config: TarFlowConfig, condition: Any, batch_size: int, name: str = "condition") -> jax.Array:
    """Returns float32 [B, C], [B, T, C] or [B, L, C]; raises ValueError for another shape, or if it is not finite."""
    condition, expected = jnp.asarray(condition, jnp.float32), (batch_size, *config.condition_shape)
    if name == "null_condition" and condition.shape == expected[1:]:
        condition = jnp.broadcast_to(condition[None], expected)
    if not config.condition_dim or condition.shape != expected:
        wanted = f"expected {expected}" if config.condition_dim else "this model has no condition"
        raise UserError(f"{name} has shape {condition.shape}; {wanted}")
    if not is_traced(condition) and not (finite := np.isfinite(np.asarray(condition))).all():
        raise UserError(f"{name} is not finite in row {np.argwhere(~finite)[0][0]}")
    return condition


def check_levels(config: TarFlowConfig, noise_std: Any, batch_size: int) -> jax.Array | None:
    """Returns noise levels σ as float32 [B], None for a flow of one level; raises ValueError for what does not fit.

    Args:
      noise_std: a number, or [B]; None if it is not given.
    """
    if not config.noise_conditional:
        if noise_std is not None:
            raise UserError(f"noise_std is {shown(noise_std)}, but this model is of one noise level; leave it out")
        return None
    if noise_std is None:
        raise UserError(
            "this model is of many noise levels; say at which, noise_std=σ (a number, or one for each image)"
        )
    try:
        levels = jnp.asarray(noise_std, jnp.float32)
    except (TypeError, ValueError):
        raise UserError(f"noise_std is {shown(noise_std)}; expected a number or ({batch_size},)") from None
    if levels.shape not in ((), (batch_size,)):
        raise UserError(f"noise_std has shape {levels.shape}; expected a number or ({batch_size},)")
    values = None if is_traced(levels) else np.asarray(levels)
    if values is not None and not ((values > 0) & (values < math.inf)).all():
        raise UserError(f"noise_std is {shown(noise_std)}; expected positive numbers")
    return jnp.broadcast_to(levels, (batch_size,))
