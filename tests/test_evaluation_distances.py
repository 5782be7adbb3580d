import contextlib
import functools
import logging

import chex
import flax.linen as nn
import numpy as np
import pytest

from tarflow_jax import files
from tarflow_jax.data import ArraySource
from tarflow_jax.evaluation import classifier, distances, scores
from tarflow_jax.evaluation.features import FeatureNetwork, Features
from tarflow_jax.evaluation.scores import FeatureStatistics
from tarflow_jax.files import write_npz
from tarflow_jax.student import Perception


class Pixels(nn.Module):
    def __call__(self, images):
        flat = images.reshape(images.shape[0], -1).astype("float32")
        return Features(flat, flat[:, :2], flat[:, :3])


PIXELS = FeatureNetwork("inception", "the pixels themselves", "none", Pixels(), {}, bytes_per_image=1000)


def random_images(number, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (number, 2, 2, 1), dtype=np.uint8)


def test_a_network_pads_and_keeps_order():
    images = random_images(1000)
    features = PIXELS(images)
    np.testing.assert_array_equal(features.pooled, images.reshape(1000, 4))
    np.testing.assert_array_equal(features.spatial, images.reshape(1000, 4)[:, :3])


@contextlib.contextmanager
def from_the_cache():
    """Fails a test that computes features."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(FeatureNetwork, "__call__", lambda *_: pytest.fail("computed again"))
        yield


def test_reference_is_computed_once_for_each_set_of_images(tmp_path, monkeypatch):
    monkeypatch.setattr(distances, "IMAGES_AT_A_TIME", 300)
    monkeypatch.setattr(distances, "NUM_REAL_FEATURES", 100)
    images = random_images(1000)
    source = ArraySource("noise", images)
    reference = distances.data_set_reference(PIXELS, source, "train", tmp_path)
    flat = images.reshape(1000, 4).astype(np.float64)
    np.testing.assert_allclose(reference.pooled.mean, flat.mean(0), rtol=1e-12)
    np.testing.assert_allclose(reference.spatial.covariance, np.cov(flat[:, :3], rowvar=False), rtol=1e-10)
    np.testing.assert_array_equal(reference.features, flat[::10])
    assert reference.protocol["preprocessing"] == "none"

    other = ArraySource("noise", random_images(1000, seed=1))  # of the same name and size
    changed = distances.data_set_reference(PIXELS, other, "train", tmp_path)
    np.testing.assert_allclose(changed.pooled.mean, other.images.reshape(1000, 4).mean(0), rtol=1e-12)
    for found, among in ((reference, source), (changed, other)):
        with from_the_cache():
            again = distances.data_set_reference(PIXELS, ArraySource("noise", among.images), "train", tmp_path)
        np.testing.assert_array_equal(again.pooled.covariance, found.pooled.covariance)
        np.testing.assert_array_equal(again.spatial.mean, found.spatial.mean)
        np.testing.assert_array_equal(again.features, found.features)
        assert again.protocol == found.protocol


def test_a_damaged_reference_is_computed_again(tmp_path, damage):
    source = ArraySource("noise", random_images(50))
    reference = distances.data_set_reference(PIXELS, source, "train", tmp_path)
    (path,) = tmp_path.iterdir()
    for _ in damage(path, 12):
        again = distances.data_set_reference(PIXELS, source, "train", tmp_path)
        np.testing.assert_array_equal(again.features, reference.features)
    with from_the_cache():
        distances.data_set_reference(PIXELS, source, "train", tmp_path)


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    (tmp_path / "cache").write_text("not a folder")
    with caplog.at_level(logging.WARNING):
        distances.data_set_reference(PIXELS, ArraySource("noise", random_images(50)), "train", tmp_path / "cache")
    assert "not cached: " in caplog.text


def test_metrics_of_a_set_against_itself(monkeypatch):
    few = functools.partial(scores.kernel_distance, subsets=3)
    monkeypatch.setattr(scores, "kernel_distance", few)
    images = random_images(1200)
    features = PIXELS(images)
    flat = features.pooled.astype(np.float64)
    statistics = FeatureStatistics(flat.mean(0), np.cov(flat, rowvar=False))
    spatial = FeatureStatistics(flat[:, :3].mean(0), np.cov(flat[:, :3], rowvar=False))
    reference = distances.Reference(statistics, spatial, features.pooled, {})
    results = distances.sample_metrics(list(distances.METRICS), "inception", features, reference)
    assert results["FID"] == pytest.approx(0, abs=1e-6)
    assert results["sFID"] == pytest.approx(0, abs=1e-6)
    assert results["precision (Inception features)"] == 1
    assert results["recall (Inception features)"] == 1
    assert (results["KID"], results["KID (std)"]) == few(features.pooled, features.pooled)
    score = scores.inception_score(features.logits)
    assert (results["inception score"], results["inception score (std)"]) == score


def test_what_a_network_or_a_reference_lacks_is_refused():
    features = PIXELS(random_images(3))
    statistics = FeatureStatistics(np.zeros(4), np.eye(4))
    bare = distances.Reference(statistics, None, None, {})
    with pytest.raises(ValueError, match="at least 4 images"):
        distances.sample_metrics(["fid"], "inception", features, bare)
    with pytest.raises(ValueError, match="no spatial statistics"):
        distances.sample_metrics(["sfid"], "inception", features, bare)
    with pytest.raises(ValueError, match="no images"):
        distances.sample_metrics(["precision_recall"], "inception", features, bare)
    with pytest.raises(ValueError, match="--inception=FILE"):
        distances.check_metrics(["sfid"], "classifier", 5000)
    with pytest.raises(ValueError, match="--num_samples is 2000; fid needs at least 2048"):
        distances.check_metrics(["fid"], "inception", 2000)
    with pytest.raises(ValueError, match="--num_samples is 999; kid needs at least 1000"):
        distances.check_metrics(["fid", "kid"], "classifier", 999)
    with pytest.raises(ValueError, match="the reference split has 297 images; kid needs at least 1000"):
        distances.check_metrics(["fid", "kid"], "classifier", 1000, 297)
    distances.check_metrics(["fid", "precision_recall"], "classifier", 128, 4)


@pytest.mark.slow
def test_distances_of_classifier_features_are_not_called_fid():
    features = PIXELS(random_images(1000))
    reference = distances.Reference(FeatureStatistics(np.zeros(4), np.eye(4)), None, features.pooled, {})
    results = distances.sample_metrics(["fid", "kid", "precision_recall"], "classifier", features, reference)
    assert len(results) == 5
    assert all("(classifier features)" in name for name in results)
    assert not any("FID" in name or "KID" in name for name in results)


def test_reference_file_of_adm(tmp_path):
    images = np.repeat(random_images(40), 3, axis=-1)
    statistics = {"mu": np.zeros(12), "sigma": np.eye(12)}
    write_npz(tmp_path / "adm.npz", arr_0=images, **statistics)
    reference = distances.file_reference(PIXELS, tmp_path / "adm.npz", ["fid", "precision_recall"])
    assert reference.features.shape == (40, 12)
    assert reference.protocol == {"file": "adm.npz", "sha256": files.sha256(tmp_path / "adm.npz")}


def bright_or_dark():
    """Images uint8 [400, 8, 8, 1], and which of two classes they are of."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, 400)
    images = np.clip(random.normal(80 + 100 * labels[:, None, None, None], 20, (400, 8, 8, 1)), 0, 255)
    return images.astype(np.uint8), labels


@pytest.mark.slow
def test_classifier_learns_is_cached_and_states_its_accuracy(tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "MIN_STEPS", 20)
    images, labels = bright_or_dark()
    train = ArraySource("bright", images[:300], labels[:300], 2)
    test = ArraySource("bright", images[300:], labels[300:], 2)
    network = classifier.classifier_network(train, test, tmp_path)
    (path,) = tmp_path.iterdir()
    assert f"sha256 {files.sha256(path)} (test accuracy 1.0000" in network.identity
    monkeypatch.setattr(classifier, "train_classifier", lambda *_, **__: pytest.fail("trained again"))
    again = classifier.classifier_network(train, test, tmp_path)
    assert again.identity == network.identity
    assert again(images[:5]).pooled.shape == (5, 128)
    swapped = ArraySource("bright", images[:300], 1 - labels[:300], 2)  # of the same name and size
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        classifier.classifier_network(swapped, test, tmp_path)

    path.write_bytes(b"rubbish")
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        classifier.classifier_network(train, test, tmp_path)
    with pytest.raises(ValueError, match="no classes"):
        classifier.classifier_network(ArraySource("plain", images), test, tmp_path)


@pytest.mark.slow
def test_what_a_student_learns_by_is_another_network_and_cached(tmp_path, monkeypatch):
    images, labels = bright_or_dark()
    train = ArraySource("bright", images, labels, 2)
    params = classifier.perceptual_network_params(train, tmp_path, max_steps=25)
    logits = Perception(2).apply({"params": params}, images).logits
    assert (np.asarray(logits).argmax(1) == labels).mean() > 0.95
    deep = Perception(2).apply({"params": params}, images.astype(np.uint16) * 257).logits  # the same in 16 bits
    np.testing.assert_allclose(deep, logits, atol=1e-4)
    monkeypatch.setattr(classifier, "train_classifier", lambda *_, **__: pytest.fail("trained again"))
    chex.assert_trees_all_equal(classifier.perceptual_network_params(train, tmp_path, max_steps=25), params)
    with pytest.raises(ValueError, match=r"no classes to train a perceptual network on; set student\.perceptual to 0"):
        classifier.perceptual_network_params(ArraySource("none", images), tmp_path)
