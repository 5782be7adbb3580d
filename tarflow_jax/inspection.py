"""Likelihood of an image by patch, its class and its latents."""

from typing import NamedTuple

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


def inspect(
    pipe: TarFlowPipeline,
    image_uint8: np.ndarray,
    key: jax.Array,
    label: int = -1,
    noise_std: float | None = None,
) -> Inspection:
    """Evaluates a flow at one image [H, W, K] of the model's bit depth.

    The flow is a density of images with noise, so `key` draws noise for this one, as in `pipe.bits_per_dim`. For
    uniform noise `bits_per_dim` is the usual figure for this bit depth; for Gaussian noise it is that of the noisy
    image, comparable only under the same noise.

    Args:
      label: the class y of log p(x | y), of the patches and of the latents; -1 for no class.
      noise_std: σ, only for a noise-conditional flow.

    Raises:
      ValueError: a shape, label or noise level that does not fit the model, or log p is not finite.
    """
    image = np.asarray(image_uint8)
    expected = f"uint{pipe.config.image_bits}"
    if image.dtype != expected or image.shape != pipe.config.image_shape:
        raise UserError(f"the image is {image.dtype} {image.shape}; expected {expected} {pipe.config.image_shape}")
    num_classes, labels = pipe.config.num_classes, np.array([label], np.int32)
    noisy = to_float(image[None])
    if pipe.noise is not None:
        levels, key = check_levels(pipe.config, noise_std, 1), jax.random.fold_in(key, 0)
        noisy = pipe.noise.of_numbered(key, jnp.asarray(image[None]), jnp.arange(1), levels)
    shares = np.asarray(pipe.patch_log_prob(noisy, labels, noise_std), np.float64)[0]
    if not np.isfinite(shares).all():
        raise UserError("log p(x) is not finite: the model has diverged, or the image is too far from its data")
    latents, _ = pipe.encode(noisy, labels, noise_std)
    reconstruction = pipe.decode(latents, labels, noise_std=noise_std)
    by_class = None
    if num_classes:
        by_class = class_log_probs(lambda x, label: pipe.log_prob(x, label, noise_std), noisy, num_classes)[0]
    return Inspection(
        noisy=np.asarray(noisy[0]),
        log_prob=float(shares.sum()),
        bits_per_dim=float(bits_per_dim(shares.sum(), pipe.config.num_dims, pipe.config.image_bits)),
        patch_bits=bits_per_dim(shares, pipe.config.token_dim, pipe.config.image_bits),
        latents=np.asarray(latents[0]),
        reconstruction=np.asarray(reconstruction[0]),
        class_log_probs=by_class,
    )
