import json

import numpy as np
import pytest
import scipy.linalg

from tarflow_jax.evaluation import distances, generation, scores
from tarflow_jax.evaluation.scores import (
    FeatureStatistics,
    RunningStatistics,
    feature_statistics,
    frechet_distance,
)


def random_covariance(rng, size, rank=None):
    factor = rng.normal(size=(size, rank or size))
    return factor @ factor.T / size


def test_streamed_statistics_equal_numpy():
    features = np.random.default_rng(0).normal(3, 2, (1000, 20)).astype(np.float32)
    running = RunningStatistics()
    for part in np.split(features, [1, 100, 640]):
        running.add(part)
    statistics = running.result()
    np.testing.assert_allclose(statistics.mean, features.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(statistics.covariance, np.cov(features, rowvar=False, dtype=np.float64), rtol=1e-11)


def test_frechet_distance_of_commuting_gaussians():
    rng = np.random.default_rng(1)
    basis = scipy.linalg.qr(rng.normal(size=(30, 30)))[0]
    first, second = rng.uniform(0, 4, 30), rng.uniform(0, 4, 30)
    first[:10] = 0  # a singular covariance, as few samples leave it
    mean = rng.normal(size=30)
    distance = frechet_distance(
        FeatureStatistics(mean, basis * first @ basis.T),
        FeatureStatistics(0 * mean, basis * second @ basis.T),
    )
    expected = mean @ mean + np.square(np.sqrt(first) - np.sqrt(second)).sum()
    assert distance == pytest.approx(expected, rel=1e-7)


def test_frechet_distance_of_two_by_two_covariances():
    # For 2 x 2: tr (C C')^½ = sqrt(tr(C C') + 2 sqrt(det C det C')).
    rng = np.random.default_rng(2)
    first, second = random_covariance(rng, 2), random_covariance(rng, 2)
    root = np.sqrt(np.trace(first @ second) + 2 * np.sqrt(np.linalg.det(first) * np.linalg.det(second)))
    expected = np.trace(first) + np.trace(second) - 2 * root
    zero = np.zeros(2)
    distance = frechet_distance(FeatureStatistics(zero, first), FeatureStatistics(zero, second))
    assert distance == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_refuses_other_sizes_and_nan():
    small, large = (FeatureStatistics(np.zeros(n), np.eye(n)) for n in (2, 3))
    with pytest.raises(ValueError, match="same network"):
        frechet_distance(small, large)
    with pytest.raises(ValueError, match="not finite"):
        FeatureStatistics(np.array([np.nan]), np.eye(1))


def test_scores_equal_torch_fidelity():
    import torch
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    rng = np.random.default_rng(3)
    real = rng.normal(size=(400, 16)).astype(np.float32)
    fake = (0.7 * rng.normal(size=(300, 16)) + 0.3).astype(np.float32)
    first, second = torch.tensor(fake), torch.tensor(real)

    mean, std = scores.inception_score(fake)
    theirs = isc_features_to_metric(first)
    assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-9)
    assert std == pytest.approx(theirs["inception_score_std"], rel=1e-6)

    mean, std = scores.kernel_distance(fake, real, subsets=10, subset_size=200)
    theirs = kid_features_to_metric(first, second, kid_subsets=10, kid_subset_size=200, verbose=False)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)
    assert std == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-3)

    theirs = prc_features_to_metric(first, second, verbose=False, save_cpu_ram=False)
    # Theirs is a float32 mean.
    assert scores.precision_recall(fake, real) == pytest.approx((theirs["precision"], theirs["recall"]), rel=1e-6)
    assert 0.2 < theirs["precision"] < 1
    assert 0.1 < theirs["recall"] < 1

    distance = frechet_distance(feature_statistics(fake), feature_statistics(real))
    theirs = fid_statistics_to_metric(
        fid_features_to_statistics(first), fid_features_to_statistics(second), verbose=False
    )
    assert distance == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)


def test_precision_and_recall_of_known_points():
    real = np.arange(10.0)[:, None]  # the third neighbour is 2 away, 3 at the ends
    generated = np.array([[-2.5], [4.5], [30.0], [31.0], [32.0]])
    precision, recall = scores.precision_recall(generated, real)
    assert precision == pytest.approx(2 / 5)
    assert recall == 1  # the ball around -2.5 reaches to 31


def test_sample_file_round_trip(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 1), dtype=np.uint8)
    generation.write_samples(tmp_path / "samples.npz", images, np.arange(5))
    np.testing.assert_array_equal(generation.read_samples(tmp_path / "samples.npz"), np.repeat(images, 3, -1))
    np.testing.assert_array_equal(np.load(tmp_path / "samples.npz")["arr_1"], np.arange(5))
    assert [path.name for path in tmp_path.iterdir()] == ["samples.npz"]


def test_reference_file_of_ours_and_of_adm(tmp_path):
    statistics = {"mu": np.ones(3), "sigma": np.eye(3), "mu_s": np.zeros(2), "sigma_s": np.eye(2)}
    features = np.ones((4, 3), np.float32)
    np.savez(tmp_path / "ours.npz", **statistics, features=features, protocol=np.array('{"preprocessing": "none"}'))
    back = distances.read_reference(tmp_path / "ours.npz")
    assert back.protocol == {"preprocessing": "none"}
    np.testing.assert_array_equal(back.pooled.covariance, np.eye(3))
    np.testing.assert_array_equal(back.spatial.mean, np.zeros(2))
    np.testing.assert_array_equal(back.features, features)

    arrays = {"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "mu": np.ones(3, np.float32), "sigma": np.eye(3)}
    np.savez(tmp_path / "adm.npz", **arrays)
    back = distances.read_reference(tmp_path / "adm.npz")
    assert back.pooled.mean.dtype == np.float64
    assert back.spatial is None
    assert back.features is None
    assert back.protocol == {}


@pytest.mark.parametrize(
    "arrays",
    [
        {"arr_0": np.zeros((2, 4, 4, 3), np.float32)},
        {"arr_0": np.zeros((2, 4, 4), np.uint8)},
        {"other": np.zeros(1)},
        {"arr_0": np.array([{"a": 1}], dtype=object)},
    ],
)
def test_files_that_are_no_samples_are_refused(tmp_path, arrays):
    path = tmp_path / "bad.npz"
    np.savez(path, allow_pickle=True, **arrays)
    with pytest.raises(ValueError, match=r"bad\.npz"):
        generation.read_samples(path)
    with pytest.raises(ValueError, match=r"bad\.npz"):
        distances.read_reference(path)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npz"):
        generation.read_samples(tmp_path / "nowhere.npz")
    (tmp_path / "text.npz").write_text(json.dumps({}))
    with pytest.raises(ValueError, match="not a readable npz"):
        generation.read_samples(tmp_path / "text.npz")
