"""Likelihood of an image by patch, its class and its latents; interpolation between two images."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from tarflow_jax.arguments import check_levels
from tarflow_jax.errors import UserError
from tarflow_jax.evaluation.classification import class_log_probs
from tarflow_jax.likelihood import bits_per_dim
from tarflow_jax.noise import to_float
from tarflow_jax.pipeline import TarFlowPipeline

Progress = Callable[[float, str], Any]  # called with the share done and a description of the next step


class Inspection(NamedTuple):
    """Result of `inspect`. P is the patch size, C the number of classes."""

    noisy: np.ndarray  # x, the image with training noise, float32 [H, W, K]
    log_prob: float  # log p(x | label), nats
    bits_per_dim: float
    patch_bits: np.ndarray  # bits per dimension by patch, with mean `bits_per_dim`; float64 [H / P, W / P]
    latents: np.ndarray  # float32 [H, W, K]
    reconstruction: np.ndarray  # decode(encode(x)), float32 [H, W, K]
    class_log_probs: np.ndarray | None  # log p(x | y), nats, float64 [C]; None without classes

    @property
    def error(self) -> float:
        """Largest absolute error of the reconstruction, in [-1, 1] units."""
        return float(np.abs(self.reconstruction - self.noisy).max())

    def posterior(self, temperature: float = 1.0) -> np.ndarray:
        """p(y | x), float64 [C], by Bayes' rule under equal priors: softmax_y(log p(x | y) / temperature).

        Temperature 1 is overconfident; `launch.evaluate --metrics=classification` finds one that calibrates it. Raises
        ValueError if the flow has no classes.
        """
        if self.class_log_probs is None:
            raise UserError("this model has no classes, and so no class probabilities")
        return scipy.special.softmax(self.class_log_probs / temperature)


def with_noise(
    pipe: TarFlowPipeline, images_uint8: np.ndarray, key: jax.Array, noise_std: float | None = None
) -> jax.Array:
    """Adds the training noise, if known, to images of 8 or 16 bits [B, H, W, K]; returns float32.

    Image i gets the noise that it has in `pipe.bits_per_dim`. `noise_std` is the level, for "levels" noise.
    """
    if pipe.noise is None:
        return to_float(images_uint8)
    count = len(images_uint8)
    levels = check_levels(pipe.config, noise_std, count)
    return pipe.noise.of_numbered(jax.random.fold_in(key, 0), jnp.asarray(images_uint8), jnp.arange(count), levels)


def inspect(
    pipe: TarFlowPipeline,
    image_uint8: np.ndarray,
    key: jax.Array,
    label: int = -1,
    noise_std: float | None = None,
    progress: Progress = lambda share, what: None,
) -> Inspection:
    """Evaluates a flow at one image [H, W, K] of the model's bit depth.

    The flow is a density of images with noise, so `key` draws noise for this one. For uniform noise `bits_per_dim` is
    the usual figure for this bit depth; for Gaussian noise it is that of the noisy image, comparable only under the
    same noise.

    Args:
      label: the class y of log p(x | y), of the patches and of the latents; -1 for no class.
      noise_std: σ, only for a noise-conditional flow.
      progress: called before each step.

    Raises:
      ValueError: a shape, label or noise level that does not fit the model, or log p is not finite.
    """
    image = np.asarray(image_uint8)
    expected = f"uint{pipe.config.image_bits}"
    if image.dtype != expected or image.shape != pipe.config.image_shape:
        raise UserError(f"the image is {image.dtype} {image.shape}; expected {expected} {pipe.config.image_shape}")
    num_classes, labels = pipe.config.num_classes, np.array([label], np.int32)
    steps = num_classes + 3

    progress(0, "log p, patch by patch")
    noisy = with_noise(pipe, image[None], key, noise_std)
    shares = np.asarray(pipe.patch_log_prob(noisy, labels, noise_std), np.float64)[0]
    if not np.isfinite(shares).all():
        raise UserError("log p(x) is not finite: the model has diverged, or the image is too far from its data")
    progress(1 / steps, "latents")
    latents, _ = pipe.encode(noisy, labels, noise_std)
    progress(2 / steps, "back from the latents")
    reconstruction = pipe.decode(latents, labels, noise_std=noise_std)

    def log_prob(images: jax.Array, labels: jax.Array) -> jax.Array:
        progress((3 + int(labels[0])) / steps, "log p under each class")
        return pipe.log_prob(images, labels, noise_std)

    return Inspection(
        noisy=np.asarray(noisy[0]),
        log_prob=float(shares.sum()),
        bits_per_dim=float(bits_per_dim(shares.sum(), pipe.config.num_dims, pipe.config.image_bits)),
        patch_bits=bits_per_dim(shares, pipe.config.token_dim, pipe.config.image_bits),
        latents=np.asarray(latents[0]),
        reconstruction=np.asarray(reconstruction[0]),
        class_log_probs=class_log_probs(log_prob, noisy, num_classes)[0] if num_classes else None,
    )


def interpolate(
    pipe: TarFlowPipeline,
    images_uint8: np.ndarray,
    key: jax.Array,
    count: int,
    label: int = -1,
    noise_std: float | None = None,
    progress: Progress = lambda share, what: None,
) -> np.ndarray:
    """Interpolates between two images by `spherical` interpolation of their latents.

    Both get noise as in `inspect`; decoded images are denoised if the noise is Gaussian. So the first and last results
    are the images themselves, up to the noise that one denoising step leaves.

    Args:
      images_uint8: [2, H, W, K].
      key: for the noise.
      count: N, the number of images from first to last.
      label: class of all images, -1 for no class.
      noise_std: see `inspect`.
      progress: see `inspect`.

    Returns:
      float32 [N, H, W, K].
    """
    progress(0, "latents of both")
    noisy = with_noise(pipe, images_uint8, key, noise_std)
    (start, end), _ = pipe.encode(noisy, np.full(2, label, np.int32), noise_std)
    latents = spherical(start, end, jnp.linspace(0, 1, count))
    labels = np.full(count, label, np.int32)
    progress(0.2, f"decoding {count} images")
    images = pipe.decode(latents, labels, noise_std=noise_std)
    if pipe.noise_std is not None:
        progress(0.7, "denoising")
        images = pipe.denoise(images, labels, noise_std)
    return np.asarray(images)


def spherical(start: jax.Array, end: jax.Array, shares: jax.Array) -> jax.Array:
    """Computes (sin((1 - t) θ) a + sin(t θ) b) / sin θ with θ the angle between a and b (spherical interpolation).

    Standard normal latents have about the same norm, √(H W K), unlike points on the straight line
    between two of them. Parallel latents, where sin θ is 0, are interpolated linearly.

    Args:
      start: latents a, float32 [H, W, K].
      end: latents b.
      shares: t, float32 [N]; 0 is the start, 1 the end.

    Returns:
      float32 [N, H, W, K].
    """
    cosine = (start * end).sum() / (jnp.linalg.norm(start) * jnp.linalg.norm(end))
    angle = jnp.arccos(jnp.clip(cosine, -1, 1))
    parallel = jnp.sin(angle) < 1e-4
    sine = jnp.where(parallel, 1, jnp.sin(angle))
    of_start = jnp.where(parallel, 1 - shares, jnp.sin((1 - shares) * angle) / sine)
    of_end = jnp.where(parallel, shares, jnp.sin(shares * angle) / sine)
    of_both = jnp.stack([of_start, of_end], axis=1)  # [N, 2]
    return jnp.einsum("NE,EHWK->NHWK", of_both, jnp.stack([start, end]), precision="highest")
