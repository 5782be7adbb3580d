"""The high-level API: a trained TarFlow to encode, decode, score, denoise and sample with."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from tarflow_jax import programs
from tarflow_jax.arguments import (
    DecoderChoice,
    begins_at_student,
    check_decoder,
    check_guidance,
    check_levels,
    check_polish,
    check_student,
    check_student_guidance,
)
from tarflow_jax.density import FAR_OUTSIDE as FAR_OUTSIDE
from tarflow_jax.density import FlowDensity
from tarflow_jax.errors import UserError
from tarflow_jax.sampling import Guidance, IterativeDenoising, Sequential
from tarflow_jax.sampling.memory import decode_bytes, forward_bytes


class TarFlowPipeline(FlowDensity):
    """A trained flow. Every method is compiled once in a process for each model's and each batch's shape.

    The methods may be used within `jax.jit`, `jax.grad` and `jax.vmap`: of traced images or labels they compute at once
    and whole, with no split into batches.

    A batch too large for `memory_bound` is split into equal ones, the last one padded, so that a ragged batch
    compiles nothing new. Likelihoods are float32 at full matmul precision; the rest runs in `config.dtype`.

    Attributes:
      config: the model's shape.
      variables: the parameters in use (the averaged ones where an average was kept) and, in VP mode, the prior.
      noise: what it was trained with; None if unknown.
      card: what is known of the training, as `interop.save_model` takes it; {} for what was saved.
    """

    def decode(
        self,
        latents: Any,
        labels: Any = None,
        guidance: Guidance | None = None,
        return_trajectory: bool = False,
        decoder: DecoderChoice = None,
        return_statistics: bool = False,
        noise_std: Any = None,
        polish: int = 0,
    ) -> Any:
        """Latents -> images, the exact inverse of `encode` when there is no guidance, but for a student's.

        Args:
          latents: float [B, H, W, K], standard normal for samples.
          labels: int [B], -1 for no class; None for no class anywhere.
          guidance: see `Guidance`; None or weight 0 for none.
          return_trajectory: also return the images after 0, 1, … F inverted blocks.
          decoder: `Sequential()` (None; exact), `Jacobi()`, `GaussSeidelJacobi(…)`, a sequence of them by block
            number; "auto", what launch.tune_decoder found, `Sequential()` where it did not look; or "student", which
            makes clean images in one pass, and is not the inverse. `Jacobi(init="student")` is: it begins there.
          return_statistics: also return each block's updates and last change.
          noise_std: as of `encode`; samples are drawn at the highest level, `drawn_level`.
          polish: updates of each block that bring the student's images nearer to the inverse, which is noisy; 0 for
            the student's clean images.

        Returns:
          float32 images [B, H, W, K]; if more is asked for, a tuple with the trajectory [F + 1, B, H, W, K] and
          (iterations, residual), int32 and float32 [F, B] by block number, behind it.

        Raises:
          ValueError: a shape, dtype or label that does not fit the model, class guidance of an unconditional one, not
            one decoder a block, "auto" with other weights or guidance than were tuned, or no student of these weights.
        """
        guidance = check_guidance(self.config, guidance)
        check_polish(polish, decoder)
        if decoder == "student" and not polish:
            return self._by_student(latents, labels, guidance, return_trajectory, return_statistics)
        schedule = self.schedule if decoder == "auto" else None
        decoders = None if polish else check_decoder(self.config, schedule, decoder, guidance, len(latents))
        one_by_one = not polish and (decoders is None or Sequential() in decoders)
        of_image: Any = check_levels(self.config, noise_std, len(latents))
        function, given = programs.decode, [guidance]
        if polish or begins_at_student(decoders):
            of_image = of_image, self._guess(latents, labels, guidance)
            function, given = programs.decode_from, [guidance, jnp.int32(polish)]
        decoded = self._run(
            functools.partial(function, self.config, trajectory=return_trajectory, decoders=decoders),
            latents,
            labels,
            of_image,
            *given,
            bytes_per_image=decode_bytes(self.config, guided=guidance is not None, parallel=bool(polish or decoders)),
            # For one image XLA's CPU code copies the caches at every token; for two it does not.
            smallest=2 if self._runner.on_cores and one_by_one else 1,
        )
        results = [decoded.images]
        if return_trajectory:
            results.append(jnp.moveaxis(decoded.trajectory, 1, 0))
        if return_statistics:
            results.append((decoded.iterations.T, decoded.residual.T))
        return tuple(results) if results[1:] else decoded.images

    def _by_student(
        self, latents: Any, labels: Any, guidance: Guidance | None, return_trajectory: bool, return_statistics: bool
    ) -> Any:
        """`decode` in one pass; the trajectory ends with the noisy images."""
        if return_statistics:
            raise UserError('decoder="student" takes no updates, of which statistics could tell; polish it')
        weight = check_student_guidance(check_student(self.student).config, guidance)
        images, guess = self._ask_student(latents, labels, weight)
        if not return_trajectory:
            return images
        between = [] if guess is None else [guess[:, k] for k in reversed(range(self.config.num_blocks))]
        return images, jnp.stack([jnp.asarray(latents), *between])

    def _guess(self, latents: Any, labels: Any, guidance: Guidance | None) -> jax.Array:
        """The student's trajectory [B, F, H, W, K], with the guidance weight that is nearest of those it knows."""
        student = check_student(self.student)
        weight = 0.0 if guidance is None else min(max(guidance.weight, 0.0), student.config.max_guidance)
        _, guess = self._ask_student(latents, labels, weight)
        if guess is None:
            raise UserError("this student's method is 'naive': it has no trajectory to begin at")
        return guess

    def _ask_student(self, latents: Any, labels: Any, weight: float) -> tuple[jax.Array, jax.Array | None]:
        student = check_student(self.student)
        return self._run(
            functools.partial(programs.student, student.config),
            latents,
            labels,
            jnp.full(len(latents), weight, jnp.float32),
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
        polish: int = 0,
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
          decoder: see `decode`. What a student draws is clean, and not to be denoised.
          polish: see `decode`; polished, it is noisy.

        Returns:
          float32 [B, H, W, K], around [-1, 1] but not clipped to it.

        Raises:
          ValueError: as `decode` and `denoise`.
        """
        if decoder == "student" and not polish:
            if denoise not in (None, True) or denoise_multiplier != 1:
                raise UserError('decoder="student" gives clean images by itself; leave denoise out, or polish')
            return self.decode(self.latents(key, num_images), labels, guidance, decoder=decoder)
        if denoise is None:
            denoise = self.noise_std is not None
        if denoise and self.noise_std is None:
            self.denoise(jnp.zeros((1, *self.config.image_shape)))  # says why not
        latents = self.latents(key, num_images)
        images = self.decode(latents, labels, guidance, decoder=decoder, noise_std=self.drawn_level, polish=polish)
        if not denoise:
            return images
        method = denoise if isinstance(denoise, IterativeDenoising) else None
        return self.denoise_drawn(images, labels, denoise_multiplier, method, jax.random.fold_in(key, 1))

    def latents(self, key: jax.Array, num_images: int) -> jax.Array:
        """Standard normal latents [num_images, H, W, K], as `sample` draws them."""
        if num_images < 1:
            raise UserError(f"num_images is {num_images}; expected a positive number")
        return jax.random.normal(key, (num_images, *self.config.image_shape), jnp.float32)
