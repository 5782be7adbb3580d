"""Classification by Bayes' rule and outlier detection, both with log p(x | y)."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import scipy.special
from sklearn.metrics import roc_auc_score

from tarflow_jax.errors import UserError
from tarflow_jax.noise import to_float
from tarflow_jax.pipeline import TarFlowPipeline
from tarflow_jax.runtime import progress

NUM_LEVELS, CALIBRATION_BINS = 8, 15


def with_training_noise(
    pipe: TarFlowPipeline, images: np.ndarray, key: jax.Array, noise_std: float | None = None
) -> jax.Array:
    """Adds the training noise, if known, to integer images: float32 [N, H, W, K]; `noise_std` is a level σ."""
    if pipe.noise is None:
        return to_float(images)
    return pipe.noise(key, jnp.asarray(images), None if noise_std is None else jnp.full(len(images), noise_std))


def mean_class_log_probs(
    pipe: TarFlowPipeline, images: np.ndarray, key: jax.Array, noise_std: float | None = None, num_draws: int = 1
) -> np.ndarray:
    """Averages log p(x | y) of integer images under every label y over draws of noise: nats, float64 [N, C]."""
    log_prob = functools.partial(pipe.log_prob, noise_std=noise_std)
    keys = [key, *(jax.random.fold_in(key, draw) for draw in range(1, num_draws))]
    noisy = (with_training_noise(pipe, images, each, noise_std) for each in keys)
    return np.mean([class_log_probs(log_prob, each, pipe.config.num_classes) for each in noisy], axis=0)


def best_noise_level(pipe: TarFlowPipeline, images: np.ndarray, labels: np.ndarray, key: jax.Array) -> float:
    """Returns the noise level of training, among `NUM_LEVELS`, at which Bayes' rule classifies images best."""
    levels = [float(level) for level in pipe.noise.quantiles(NUM_LEVELS)]
    correct = [(mean_class_log_probs(pipe, images, key, level).argmax(1) == labels).sum() for level in levels]
    return levels[int(np.argmax(correct))]


def class_log_probs(
    log_prob: Callable[[jax.Array, jax.Array], jax.Array], images: jax.Array, num_classes: int
) -> np.ndarray:
    """Returns log p(x | y) of float images [N, H, W, K] under every label y, in nats: float64 [N, num_classes]."""
    labels = progress(range(num_classes), "log-likelihoods", unit="class")
    columns = [np.asarray(log_prob(images, jnp.full(len(images), label, jnp.int32)), np.float64) for label in labels]
    return np.stack(columns, axis=1)


def bayes_classification(log_probs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Classifies by argmax_y log p(x | y) under equal priors, and calibrates the posterior softmax_y(log p(x | y)).

    The posterior is overconfident, because the errors of all dimensions add up; dividing log p by a temperature
    corrects that. The temperature is fitted on images of even index, and the posterior evaluated on those of odd index.

    `log_probs` is [N, C] in nats, `labels` int [N].

    Returns:
      accuracy; temperature; negative_log_likelihood in nats and calibration_error, and both again as raw_…, at
      temperature 1.
    """
    if not np.isfinite(log_probs).all():
        raise UserError("log p(x | y) is not finite for some images; the model cannot classify them")

    def posterior_loss(log_temperature: float) -> float:
        return _negative_log_likelihood(log_probs[::2] / np.exp(log_temperature), labels[::2])

    fit = scipy.optimize.minimize_scalar(posterior_loss, bounds=(-2, 12), method="bounded")
    temperature = float(np.exp(fit.x))
    result = {"accuracy": float((log_probs.argmax(1) == labels).mean()), "temperature": temperature}
    for prefix, logits in (("", log_probs[1::2] / temperature), ("raw_", log_probs[1::2])):
        result[f"{prefix}negative_log_likelihood"] = _negative_log_likelihood(logits, labels[1::2])
        result[f"{prefix}calibration_error"] = calibration_error(logits, labels[1::2])
    return result


def _negative_log_likelihood(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(-scipy.special.log_softmax(logits, axis=1)[np.arange(len(labels)), labels].mean())


def calibration_error(logits: np.ndarray, labels: np.ndarray) -> float:
    """Expected calibration error: mean |accuracy - confidence| over 15 bins of confidence (Guo et al. 2017)."""
    posterior = scipy.special.softmax(logits, axis=1)
    confidence, correct = posterior.max(1), posterior.argmax(1) == labels
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    gaps = np.bincount(bins, correct - confidence, CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(labels))


def fit_images(images: np.ndarray, image_shape: tuple[int, int, int]) -> np.ndarray:
    """Resizes another data set's images [N, h, w, k] bilinearly to the model's shape (H, W, K).

    Grey images are repeated to K channels. Raises UserError for colour images if the model takes grey ones.
    """
    height, width, channels = image_shape
    if images.shape[-1] > channels:
        raise UserError(f"the outliers have {images.shape[-1]} channels and the model {channels}")
    resized = jax.image.resize(images.astype(np.float32), (len(images), height, width, images.shape[-1]), "bilinear")
    rounded = np.clip(np.round(np.asarray(resized)), 0, np.iinfo(images.dtype).max).astype(images.dtype)
    return np.repeat(rounded, channels // images.shape[-1], axis=-1)


def detect_outliers(
    pipe: TarFlowPipeline, inside: np.ndarray, outside: np.ndarray, key: jax.Array, noise_std: float | None = None
) -> dict[str, float]:
    """Returns `outlier_scores` for integer images: log p without labels, of both in the shape and noise of training."""

    def log_prob(images: np.ndarray, key: jax.Array) -> np.ndarray:
        noisy = with_training_noise(pipe, fit_images(images, pipe.config.image_shape), key, noise_std)
        return np.asarray(pipe.log_prob(noisy, noise_std=noise_std))

    first, second = jax.random.split(key)
    return outlier_scores(log_prob(inside, first), log_prob(outside, second), pipe.config.num_dims)


def outlier_scores(inside: np.ndarray, outside: np.ndarray, num_dims: int) -> dict[str, float]:
    """Measures how well log p separates images of the model's data set from another's.

    Flows often assign higher likelihood to simpler data sets than to their own (Nalisnick et al. 2019), so an AUROC
    below ½ is a finding, not an error. `inside` and `outside` are log p(x) in nats, [N] and [M].

    Returns:
      auroc, the probability that an image of the data set is more likely than one of the other, ties counted half;
      and both means, in nats per dimension.
    """
    both = np.concatenate([inside, outside]).astype(np.float64)
    if not np.isfinite(both).all():
        raise UserError("log p(x) is not finite for some images; outlier scores would hide them")
    return {
        "auroc": float(roc_auc_score(np.arange(len(both)) < len(inside), both)),
        "mean_inside": float(np.mean(inside) / num_dims),
        "mean_outside": float(np.mean(outside) / num_dims),
    }
