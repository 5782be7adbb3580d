"""The high-level API: a trained TarFlow to encode, decode, score, denoise and sample with."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from tarflow_jax import arguments, interop, likelihood, sampling
from tarflow_jax.arguments import DecoderChoice, check_images, check_key
from tarflow_jax.errors import UserError
from tarflow_jax.flow import Conditioning, TarFlowConfig
from tarflow_jax.interop import SavedModel
from tarflow_jax.noise import Noise
from tarflow_jax.options import checked
from tarflow_jax.runtime import BatchRunner, in_float32
from tarflow_jax.runtime.batch_runner import backward_bytes, decoding_bytes, gradient_config, is_traced
from tarflow_jax.sampling import (
    DEFAULT_DENOISING,
    Decoded,
    Guidance,
    IterativeDenoising,
    Sequential,
    Student,
)
from tarflow_jax.sampling.decode import decode_by_student
from tarflow_jax.student import StudentConfig, TrainedStudent
from tarflow_jax.training.workdir import read_student, read_workdir

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Static:
    """What of a pipeline is not an array. Pipelines of one shape can be stacked, whatever the last two are."""

    config: TarFlowConfig
    noise: Noise | None
    label_names: tuple[str, ...]
    runner: BatchRunner
    student: StudentConfig | None
    student_flow: str = dataclasses.field(compare=False)
    card: Mapping[str, Any] = dataclasses.field(compare=False)


class TarFlowPipeline:
    """A trained flow. Each method compiles once per process for each shape of model and batch.

    A pipeline is a JAX pytree whose leaves are its variables and those of its student, so it may be an argument of
    `jax.jit`, `jax.grad` and `jax.vmap`, and `jax.tree.map` returns one. Gradients are those of the parameters; the
    prior variance and the constants have none. Where pipelines meet, as in a stack, the first one's card survives.

    Methods work inside JAX's transformations: if any argument is traced, they run as a single batch, without checks of
    values. Otherwise a batch too large for `memory_bound` is split into equal ones, the last one padded, so that a
    ragged batch does not recompile. Likelihoods are float32 at full matmul precision; the rest runs in `config.dtype`.

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
        student: TrainedStudent | None = None,
        mesh: Mesh | None = None,
        memory_bound: int | None = None,
    ) -> None:
        """Wraps variables of the shape of `config`; see the attributes.

        Args:
          ema_params: averaged parameters, used instead of the raw ones; `save_pretrained` keeps both.
          student: for the decoder `Student()`.
          mesh: devices to run on (`tarflow_jax.runtime.make_mesh`); None is the default device.
          memory_bound: bytes that a batch's activations may take, on all devices together; None is half of what an
            accelerator has beside the variables, and 2 GiB on CPUs.
        """
        self.config = checked("config", config, TarFlowConfig)
        self.noise = checked("noise", noise, Noise | None)
        self.card: Mapping[str, Any] = card or {}
        self.label_names = tuple(label_names)
        self._runner = BatchRunner(mesh, checked("memory_bound", memory_bound, int | None, low=1))
        self._raw_params, variables = None, arguments.check_variables(config, variables)
        if ema_params is not None:
            self._raw_params = variables["params"]
            variables = arguments.check_variables(config, {**variables, "params": ema_params})
        self.variables = self._runner.place(variables)
        if student is not None:
            student = dataclasses.replace(student, variables=self._runner.place(student.variables))
        self._student = student

    def __repr__(self) -> str:
        config, leaves = self.config, jax.tree.leaves(self.variables)
        traced = is_traced(leaves) or not all(isinstance(leaf, jax.Array) for leaf in leaves)
        where = "no device" if traced else ", ".join(sorted(map(str, leaves[0].devices())))
        patch = "" if config.is_sequence else f"{config.patch_size}-"
        shape = f"{'x'.join(map(str, config.data_shape))}, {patch}{config.width}-{config.depths}"
        noise = self.noise or ("none" if config.is_sequence else "unknown")
        number = sum(np.size(leaf) for leaf in jax.tree.leaves(self.variables["params"]))
        return (
            f"{type(self).__name__}({shape}, {config.num_classes or 'no'} classes, noise {noise}, "
            f"{number:,} parameters on {where})"
        )

    def _flatten(self) -> tuple[Any, _Static]:
        student = self._student
        config, flow = (None, "") if student is None else (student.config, student.flow)
        static = _Static(self.config, self.noise, self.label_names, self._runner, config, flow, self.card)
        children = {"variables": self.variables, "student": student and student.variables}
        return tuple((jax.tree_util.GetAttrKey(name), child) for name, child in children.items()), static

    @classmethod
    def _unflatten(cls, static: _Static, children: Any) -> Self:
        # Skips the constructor: the leaves of a pytree may be tracers, shapes or anything else.
        pipe = object.__new__(cls)
        pipe.config, pipe.noise, pipe.label_names = static.config, static.noise, static.label_names
        pipe.card, pipe._runner, pipe._raw_params = static.card, static.runner, None
        pipe.variables, variables = children
        config = static.student
        pipe._student = None if config is None else TrainedStudent(config, variables, static.student_flow)
        return pipe

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
            student = read_student(folder, options.get("mesh"))
        elif best:
            raise UserError(f"{name} is no training workdir; only these have a best checkpoint")
        else:
            folder = interop.local_folder(name)
            saved, student = interop.load_model(folder), interop.load_student(folder)
        options |= {"ema_params": saved.ema_params, "card": saved.card, "label_names": saved.label_names}
        return cls(saved.config, saved.variables, saved.noise, student=student, **options)

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
        """Loads a state dict of a PyTorch reference, TarFlow, iTARFlow or STARFlow; see `interop.load_torch`.

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

        Keeps both the averaged and the raw parameters. Measured figures and the student belong to the exact weights:
        they are left out if `dtype` is bfloat16, which rounds the weights.

        Args:
          card: fields to add to those of the run: its samples, and what launch.evaluate measured with these weights.
        """
        variables, ema_params = self.variables, None
        if self._raw_params is not None:
            variables, ema_params = {**variables, "params": self._raw_params}, variables["params"]
        try:
            student = self.student
        except UserError as error:
            student = None
            logger.warning("the student is left out: %s", error)
        card = {**self.card, **(card or {})}
        saved = SavedModel(self.config, variables, self.noise, ema_params, card, self.label_names)
        interop.save_model(folder, saved, dtype=dtype, student=student)

    def push_to_hub(self, name: str, *, private: bool = False, token: str | None = None, **options: Any) -> str:
        """Saves the model to the Hugging Face hub as "owner/name"; see `interop.push_model`.

        `options` are those of `save_pretrained`. Returns the commit's URL.
        """
        return interop.push_model(self.save_pretrained, name, private=private, token=token, **options)

    # Noise and student

    @property
    def noise_std(self) -> float | None:
        """σ of the Gaussian noise in samples: that of the training, or its highest level; None for other noise."""
        if self.noise is None or self.noise.kind == "uniform":
            return None
        return self.noise.std_max if self.noise.kind == "levels" else self.noise.std

    @property
    def sampling_noise_std(self) -> float | None:
        """Noise level of a noise-conditional flow's samples, for `decode`; None for other flows."""
        return self.noise_std if self.config.noise_conditional else None

    @functools.cached_property
    def student(self) -> TrainedStudent | None:
        """The network of `Student()`, or None; raises ValueError if it was trained for other weights."""
        if self._student is not None and not is_traced((self.variables, self._student.variables)):
            self._student.check_flow(self.variables)
        return self._student

    def require_student(self) -> TrainedStudent:
        """Returns `student`; raises ValueError if there is none."""
        if self.student is None:
            raise UserError("this model has no student; train one with launch.distill, or name another decoder")
        return self.student

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
        rows = self._rows(images, labels, noise_std, condition, mask)
        return self._runner.call(likelihood.encode, self.config, self.variables, rows)

    def log_prob(
        self, images: Any, labels: Any = None, noise_std: Any = None, condition: Any = None, mask: Any = None
    ) -> jax.Array:
        """Returns log p(x | label, condition), float32 [B], nats; arguments and errors are those of `encode`."""
        rows = self._rows(images, labels, noise_std, condition, mask)
        return self._runner.call(likelihood.log_prob, in_float32(self.config), self.variables, rows)

    def patch_log_prob(
        self, images: Any, labels: Any = None, noise_std: Any = None, condition: Any = None
    ) -> jax.Array:
        """Returns each patch's share of log p(x | label), float32 [B, H / P, W / P], nats; they add up to `log_prob`.

        `likelihood.patch_log_prob` explains what a share means. Arguments and errors are those of `encode`.
        """
        arguments.require_images(self.config, "patch_log_prob")
        rows = self._rows(images, labels, noise_std, condition)
        return self._runner.call(likelihood.patch_log_prob, in_float32(self.config), self.variables, rows)

    def bits_per_dim(
        self, key: jax.Array, images_uint8: Any, labels: Any = None, noise_std: Any = None, condition: Any = None
    ) -> jax.Array:
        """Returns bits per dimension, float32 [B], of uint8 or uint16 images [B, H, W, K], dequantised uniformly.

        This is an upper bound in expectation over the noise that `key` draws. Other arguments and errors are those of
        `encode`.
        """
        images = arguments.check_pixels(self.config, images_uint8)
        rows = {"images": images, "index": jnp.arange(len(images))}
        rows["conditioning"] = self._conditioning(len(images), labels, noise_std, condition)
        key = jax.random.fold_in(check_key(key), 0)
        return self._runner.call(likelihood.image_bits_per_dim, in_float32(self.config), self.variables, rows, key=key)

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
        std = arguments.check_denoising(self.config, self.noise, noise_std, multiplier, method, return_trajectory)
        level, images = std if self.config.noise_conditional else None, check_images(self.config, images)
        rows = {"images": images, "conditioning": self._conditioning(len(images), labels, level, condition, mask)}
        config = gradient_config(self.config, self._runner, self.variables)
        options: dict[str, Any] = {"rows": rows, "bytes_per_image": backward_bytes(config)}
        run: Any = functools.partial(self._runner.call, config=config, variables=self.variables, **options)
        if method is None:
            rows["noise_std"] = jnp.broadcast_to(jnp.asarray(std, jnp.float32), len(images))
            return run(sampling.denoise, multiplier=arguments.check_number("multiplier", multiplier))
        if method.kind == "sde":
            rows["key_data"] = jax.random.key_data(jax.random.split(check_key(key), len(images)))
        # The lowest level is traced, so that another one does not recompile.
        std_min = jnp.float32(method.std_min or (self.noise and self.noise.std_min))
        method = dataclasses.replace(method, std_min=None)
        result = run(functools.partial(sampling.iterate, method=method, trajectory=return_trajectory), std_min=std_min)
        if not return_trajectory:
            return result
        path = jnp.concatenate([images[None], jnp.moveaxis(result, 1, 0)])
        return path[-1], path

    def denoise_samples(
        self,
        images: jax.Array,
        labels: Any = None,
        multiplier: float = 1.0,
        method: IterativeDenoising | None = None,
        **options: Any,
    ) -> Any:
        """Denoises samples. `method=None`: one Tweedie step, or four steps for a noise-conditional flow of pixels.

        Options, results and errors are those of `denoise`.
        """
        if method is None and self.config.noise_conditional and self.config.image_bits:
            method = DEFAULT_DENOISING
        return self.denoise(images, labels, self.sampling_noise_std, multiplier, method, **options)

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
            these for each block, by block number; and `Student()`, which makes clean images in one pass and is not the
            inverse.
          noise_std: see `encode`; samples are drawn at the highest level, `sampling_noise_std`.
          condition: see `encode`.
          mask: see `encode`.
          null_condition: what guidance pushes away from instead of the model's own null condition, such as the
            embeddings of the empty text; shaped as `condition`, or without the batch axis.

        Returns:
          float32 [B, H, W, K].

        Raises:
          ValueError: a shape, dtype or label that does not fit the model, class guidance of an unconditional one, not
            one decoder per block, or no student of these weights.
        """
        keywords = noise_std, condition, mask, null_condition
        return self._decode(sampling.decode, latents, labels, guidance, decoder, *keywords)

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
        keywords = noise_std, condition, mask, null_condition
        return self._decode(sampling.decode_trace, latents, labels, guidance, decoder, *keywords)

    def _decode(
        self, function: Any, latents: Any, labels: Any, guidance: Any, decoder: DecoderChoice, *keywords: Any
    ) -> Any:
        """Calls `sampling.decode`, `decode_trace` or `decode_log_prob`."""
        without_null = self._condition_required and keywords[-1] is None
        guidance = arguments.check_guidance(self.config, guidance, without_null)
        latents = check_images(self.config, latents, "latents")
        if isinstance(decoder, Student) and not decoder.polish:
            weight = arguments.check_student_guidance(self.require_student().config, guidance)
            images, path = self._by_student(latents, labels, weight)
            if function is sampling.decode:
                return images
            trajectory = jnp.concatenate([latents[:, None], jnp.flip(path, 1)], axis=1)
            return Decoded(images, None, trajectory, None, None)
        rows = {"latents": latents, "conditioning": self._conditioning(len(latents), labels, *keywords)}
        decoders = arguments.check_decoders(self.config, decoder)
        if decoders and any(isinstance(one, Student) or getattr(one, "init", "") == "student" for one in decoders):
            most = self.require_student().config.max_guidance
            weight = jnp.clip(guidance.weight, 0, most) if guidance else 0.0
            _, rows["guess"] = self._by_student(latents, labels, weight)
        return self._runner.call(
            functools.partial(function, decoders=decoders),
            self.config,
            self.variables,
            rows,
            bytes_per_image=decoding_bytes(self.config, at_once=decoders is not None) * (1 if guidance is None else 2),
            # For one image, XLA on CPU copies the caches at every token; for two it does not.
            smallest=2 if decoders is None or Sequential() in decoders else 1,
            guidance=guidance,
        )

    def _by_student(self, latents: Any, labels: Any, weight: Any) -> tuple[jax.Array, jax.Array]:
        """Returns the student's clean images [B, H, W, K], and its trajectory [B, F, H, W, K] by block number."""
        student, labels = self.require_student(), arguments.check_labels(self.config, labels, len(latents))
        rows = {"latents": latents, "labels": labels, "weights": jnp.full(len(latents), weight, jnp.float32)}
        function = functools.partial(decode_by_student, config=student.config)
        return self._runner.call(function, student.config.shape, student.variables, rows)

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
          denoise: whether to apply `denoise_samples`; None does so for models trained with Gaussian noise. A
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
        asked = decoder, denoise, denoise_multiplier, return_log_prob
        denoise = arguments.check_sampling(self.config, self.noise, *asked)
        latents = self.latents(key, num_images)
        function = sampling.decode_log_prob if return_log_prob else sampling.decode
        keywords = self.sampling_noise_std, condition, mask, null_condition
        images = self._decode(function, latents, labels, guidance, decoder, *keywords)
        if not denoise:
            return images
        method, key = denoise if isinstance(denoise, IterativeDenoising) else None, jax.random.fold_in(key, 1)
        return self.denoise_samples(images, labels, denoise_multiplier, method, key=key, condition=condition, mask=mask)

    def latents(self, key: jax.Array, num_images: int) -> jax.Array:
        """Draws the standard normal latents of `sample`, shaped as the model's images or sequences."""
        shape = (checked("num_images", num_images, int, low=1), *self.config.data_shape)
        return jax.random.normal(check_key(key), shape, jnp.float32)

    # Running

    @functools.cached_property
    def _condition_required(self) -> bool:
        return arguments.condition_required(self.config, self.variables)

    def _conditioning(self, batch_size: int, *keywords: Any) -> Conditioning:
        """Checks keywords in the order of `arguments.check_conditioning`."""
        required = self._condition_required
        return arguments.check_conditioning(self.config, batch_size, *keywords, noise=self.noise, required=required)

    def _rows(self, images: Any, *keywords: Any) -> dict[str, Any]:
        """Checks the arrays [B, …] of a call and returns them by argument name; warns about unscaled pixels."""
        images = check_images(self.config, images)
        if not self.config.is_sequence:
            arguments.warn_about_pixels(images)
        return {"images": images, "conditioning": self._conditioning(len(images), *keywords)}


jax.tree_util.register_pytree_with_keys(TarFlowPipeline, TarFlowPipeline._flatten, TarFlowPipeline._unflatten)
