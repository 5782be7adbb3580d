import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from tarflow_jax.evaluation.classification import (
    bayes_classification,
    calibration_error,
    class_log_probs,
    fit_images,
    outlier_scores,
)


def test_log_probs_and_accuracy_of_known_gaussians():
    # p(x | y) = N(y, σ²): the Bayes classifier takes the nearest class, right for |noise| < 1/2.
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 30000)
    images = jnp.asarray(labels + 0.5 * random.normal(size=30000), jnp.float32).reshape(-1, 1, 1, 1)

    def log_prob(images, labels):
        return -2 * jnp.square(images[:, 0, 0, 0] - labels.astype(jnp.float32))

    log_probs = class_log_probs(log_prob, images, 3)
    assert log_probs.shape == (30000, 3)
    result = bayes_classification(log_probs, labels)
    expected = 1 - 4 / 3 * scipy.stats.norm.sf(1)  # the outer classes err on one side only
    assert result["accuracy"] == pytest.approx(expected, abs=0.02)
    nearest = np.rint(np.asarray(images, np.float64).ravel()).clip(0, 2)
    assert result["accuracy"] == (nearest == labels).mean()
    # The posterior is the true one: it needs no temperature and is calibrated.
    assert result["temperature"] == pytest.approx(1, abs=0.1)
    assert_posterior(result, log_probs, labels)
    assert result["calibration_error"] < 0.03


def assert_posterior(result, log_probs, labels):
    """The fit on even images and the figures on odd ones, by plain loops over bins and temperatures."""

    def loss(logits, labels):
        return -np.log(np.exp(logits[range(len(labels)), labels]) / np.exp(logits).sum(1)).mean()

    def error(logits, labels):
        posterior = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        confidence, right = posterior.max(1), posterior.argmax(1) == labels
        total = 0.0
        for low in range(15):
            inside = (confidence >= low / 15) & ((confidence < (low + 1) / 15) | (low == 14))
            if inside.any():
                total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
        return total

    log_probs = log_probs - log_probs.max(1, keepdims=True)
    temperature = result["temperature"]
    slightly_off = (loss(log_probs[::2] / (temperature * f), labels[::2]) for f in (0.999, 1.001))
    assert loss(log_probs[::2] / temperature, labels[::2]) < min(slightly_off)
    odd = log_probs[1::2]
    for prefix, logits in (("", odd / temperature), ("raw_", odd)):
        loss_found, error_found = (result[prefix + name] for name in ("negative_log_likelihood", "calibration_error"))
        assert loss_found == pytest.approx(loss(logits, labels[1::2]), rel=1e-9)
        assert error_found == pytest.approx(error(logits, labels[1::2]), rel=1e-9)


def test_temperature_undoes_overconfidence():
    random = np.random.default_rng(1)
    logits = random.normal(size=(20000, 4))
    labels = np.array([random.choice(4, p=row) for row in np.exp(logits) / np.exp(logits).sum(1, keepdims=True)])
    result = bayes_classification(50 * logits, labels)
    assert result["temperature"] == pytest.approx(50, rel=0.05)
    assert_posterior(result, 50 * logits, labels)
    assert result["calibration_error"] < 0.02 < 0.3 < result["raw_calibration_error"]


def test_calibration_error_by_hand():
    # Two images of confidence 0.8, one right; error |0.5 - 0.8|.
    logits = np.log([[0.8, 0.2], [0.8, 0.2]])
    assert calibration_error(logits, np.array([0, 1])) == pytest.approx(0.3)


def test_log_probs_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        bayes_classification(np.array([[0, np.nan]]), np.array([0]))


def test_outlier_scores():
    scores = outlier_scores(np.array([1.0, 2.0, 3.0]), np.array([0.0, 2.0]), num_dims=2)
    # Pairs won: 1 > 0, 2 > 0, 3 > 0, 3 > 2, and the tie 2 = 2 for a half.
    assert scores["auroc"] == pytest.approx(4.5 / 6)
    assert scores["mean_inside"] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="not finite"):
        outlier_scores(np.array([np.inf]), np.array([0.0]), num_dims=2)


def test_outliers_take_the_shape_of_the_model():
    images = np.full((2, 8, 8, 1), 77, np.uint8)
    fitted = fit_images(images, (28, 32, 3))
    np.testing.assert_array_equal(fitted, np.full((2, 28, 32, 3), 77, np.uint8))
    deep = fit_images(images.astype(np.uint16) * 500, (28, 32, 3))
    np.testing.assert_array_equal(deep, np.full((2, 28, 32, 3), 38500, np.uint16))
    with pytest.raises(ValueError, match="3 channels"):
        fit_images(fitted, (8, 8, 1))
