"""Distances between generated images and a data set: metrics by name, and reference statistics of the real images."""

import contextlib
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from tarflow_jax.data import ImageSource
from tarflow_jax.errors import UserError
from tarflow_jax.evaluation import scores
from tarflow_jax.evaluation.features import FeatureNetwork, Features, cache_errors_logged
from tarflow_jax.evaluation.generation import as_colour, read_samples
from tarflow_jax.evaluation.scores import NEIGHBOURS, NUM_SPLITS, SUBSET_SIZE, FeatureStatistics, RunningStatistics
from tarflow_jax.files import read_npz, sha256, write_npz

NUM_REAL_FEATURES = 10_000  # for precision, recall and the kernel distance; as many as images in ADM's files
IMAGES_AT_A_TIME = 4096
MAX_STATISTICS_BYTES = 128 * 2**20  # 10,000 x 2048 float32 features take 79 MiB

NAMES = {
    "inception": {
        "fid": "FID",
        "sfid": "sFID",
        "inception_score": "inception score",
        "kid": "KID",
        "precision_recall": "{} (Inception features)",
    },
    "classifier": {
        "fid": "Fréchet distance (classifier features)",
        "kid": "kernel distance (classifier features)",
        "precision_recall": "{} (classifier features)",
    },
}
METRICS = tuple(NAMES["inception"])
NUM_FEATURES = {"inception": 2048, "classifier": 128}
MIN_IMAGES = {"inception_score": NUM_SPLITS, "kid": SUBSET_SIZE, "precision_recall": NEIGHBOURS + 1}


@dataclasses.dataclass(frozen=True)
class Reference:
    """Features of the real images."""

    pooled: FeatureStatistics  # of a whole split
    spatial: FeatureStatistics | None  # of a whole split, for sFID
    features: np.ndarray | None  # pooled features of some of the images, float32 [M, D]
    protocol: dict[str, Any]  # what was measured and how; empty in other projects' files


def read_reference(path: epath.PathLike) -> Reference:
    """Reads a reference file, ours or ADM's; raises FileNotFoundError if missing, UserError for other files."""
    arrays = read_npz(path, ("mu", "sigma", "mu_s", "sigma_s", "features", "protocol"), MAX_STATISTICS_BYTES)
    if not {"mu", "sigma"} <= arrays.keys():
        raise UserError(f"{path} holds no reference statistics: expected arrays mu and sigma")

    def statistics(mean: str, covariance: str) -> FeatureStatistics:
        return FeatureStatistics(arrays[mean].astype(np.float64), arrays[covariance].astype(np.float64))

    try:
        pooled = statistics("mu", "sigma")
        spatial = statistics("mu_s", "sigma_s") if {"mu_s", "sigma_s"} <= arrays.keys() else None
        protocol = json.loads(str(arrays["protocol"])) if "protocol" in arrays else {}
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error
    features, size = arrays.get("features"), pooled.mean.shape
    if pooled.covariance.shape != 2 * size or (features is not None and features.shape[1:] != size):
        raise UserError(f"{path}: mu {list(size)} does not fit sigma {list(pooled.covariance.shape)} or the features")
    return Reference(pooled, spatial, features, protocol)


def data_set_reference(network: FeatureNetwork, source: ImageSource, split: str, cache_dir: Path) -> Reference:
    """Returns the statistics of all images of a split, read from `cache_dir` or computed and cached.

    The file is named by a hash of the protocol, which identifies the images and the network. It has ADM's arrays of
    statistics (`mu`, `sigma`, `mu_s`, `sigma_s`), our `features`, and the protocol as JSON.
    """
    protocol = {
        "data_set": source.name,
        "data_fingerprint": source.fingerprint[:16],
        "split": split,
        "num_images": len(source),
        "image_shape": list(source.image_shape),
        "flips": "none",
        "preprocessing": source.preprocessing,
        "network_preprocessing": network.preprocessing,
        "network": f"{network.name}, {network.identity}",
    }
    path = Path(cache_dir) / f"reference-{hashlib.sha256(json.dumps(protocol).encode()).hexdigest()[:16]}.npz"
    with contextlib.suppress(FileNotFoundError, UserError):
        return read_reference(path)
    running, running_spatial, kept = RunningStatistics(), RunningStatistics(), []
    stride = -(-len(source) // NUM_REAL_FEATURES)
    for start in range(0, len(source), IMAGES_AT_A_TIME):
        images, _ = source.read(np.arange(start, min(start + IMAGES_AT_A_TIME, len(source))))
        features = network(images, f"features of {source.name} from image {start}")
        running.add(features.pooled)
        kept.append(features.pooled[-start % stride :: stride])
        if features.spatial is not None:
            running_spatial.add(features.spatial)
    pooled, spatial, kept_features = running.result(), None, np.concatenate(kept)
    arrays = {"mu": pooled.mean, "sigma": pooled.covariance, "features": kept_features}
    if running_spatial.count:
        spatial = running_spatial.result()
        arrays |= {"mu_s": spatial.mean, "sigma_s": spatial.covariance}
    with cache_errors_logged():
        write_npz(path, **arrays, protocol=np.array(json.dumps(protocol)))
    return Reference(pooled, spatial, kept_features, protocol)


def file_reference(network: FeatureNetwork, path: str | Path, metrics: list[str]) -> Reference:
    """Reads a reference file; computes features of its images (`arr_0`) if precision, recall or KID need them."""
    reference = read_reference(path)
    features, protocol = reference.features, {"file": Path(path).name, "sha256": sha256(path)} | reference.protocol
    if features is None and {"kid", "precision_recall"} & set(metrics):
        features = network(as_colour(read_samples(path)), "features of the reference").pooled
    return dataclasses.replace(reference, features=features, protocol=protocol)


def check_metrics(metrics: list[str], network: str, num_samples: int, num_real: int | None = None) -> None:
    """Raises UserError for a metric that is undefined for this network, or needs more images."""
    for metric in metrics:
        if metric not in NAMES[network]:
            raise UserError(f"{metric} is defined by Inception's features alone; name their file, --inception=FILE")
        needed = MIN_IMAGES.get(metric, NUM_FEATURES[network])
        if num_samples < needed:
            raise UserError(f"--num_samples is {num_samples}; {metric} needs at least {needed}")
        if num_real is not None and metric in ("kid", "precision_recall") and num_real < needed:
            raise UserError(f"the reference split has {num_real} images; {metric} needs at least {needed}")


def sample_metrics(metrics: list[str], network: str, features: Features, reference: Reference) -> dict[str, Any]:
    """Returns {printed name: value} for the metrics, computed from generated images' features.

    Scores over splits or subsets come with their standard deviation, as "… (std)". Raises UserError for metrics that
    the reference does not support, and for fewer images than features.
    """
    names, results = NAMES[network], {}
    for metric in metrics:
        name = names[metric]
        if metric == "fid":
            results[name] = scores.frechet_distance(scores.feature_statistics(features.pooled), reference.pooled)
        elif metric == "sfid":
            if reference.spatial is None:
                raise UserError("the reference has no spatial statistics (mu_s, sigma_s), which sFID needs")
            results[name] = scores.frechet_distance(scores.feature_statistics(features.spatial), reference.spatial)
        elif metric == "inception_score":
            results[name], results[f"{name} (std)"] = scores.inception_score(features.logits)
        elif reference.features is None:
            raise UserError("the reference has no images, which the kernel distance, precision and recall need")
        elif metric == "kid":
            results[name], results[f"{name} (std)"] = scores.kernel_distance(features.pooled, reference.features)
        else:
            precision, recall = scores.precision_recall(features.pooled, reference.features)
            results |= {name.format("precision"): precision, name.format("recall"): recall}
    return results
