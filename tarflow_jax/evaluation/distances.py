"""Distances between generated images and a data set: which are asked for, under which name, against what."""

from pathlib import Path
from typing import Any

import numpy as np

from tarflow_jax.data import ImageSource
from tarflow_jax.errors import UserError
from tarflow_jax.evaluation.features import FeatureExtractor, Features
from tarflow_jax.evaluation.sample_files import (
    Reference,
    as_colour,
    file_stem,
    read_reference,
    read_samples,
    write_reference,
)
from tarflow_jax.evaluation.scores import inception_score, kernel_distance, precision_recall
from tarflow_jax.evaluation.statistics import FeatureStatistics, RunningStatistics, feature_statistics, frechet_distance

# As many real images as ADM's reference files carry for precision, recall and the kernel distance.
NUM_REAL_FEATURES = 10_000
IMAGES_AT_A_TIME = 4096

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


def check_metrics(metrics: list[str], network: str) -> None:
    """Raises ValueError for a metric that does not exist, or not under this network."""
    for metric in metrics:
        if metric not in METRICS:
            raise UserError(f"unknown metric {metric!r}; expected one of {', '.join(METRICS)}")
        if metric not in NAMES[network]:
            raise UserError(f"{metric} is defined by Inception's features alone; name their file, --inception=FILE")


def data_set_reference(
    extractor: FeatureExtractor, source: ImageSource, split: str, preprocessing: str, cache_dir: Path
) -> Reference:
    """Statistics of all images of a split, computed once and kept in `cache_dir` with their protocol.

    `preprocessing` is what the source did to its images, in words ("tarflow", "adm", "none").
    """
    network = extractor.network
    protocol = {
        "data_set": source.name,
        "split": split,
        "num_images": len(source),
        "image_shape": list(source.image_shape),
        "flips": "none",
        "preprocessing": preprocessing,
        "network_preprocessing": network.preprocessing,
        "network": f"{network.name}, {network.identity}",
    }
    shape = "x".join(map(str, source.image_shape))
    path = Path(cache_dir) / f"{file_stem('reference', source.name, shape, split, network.name)}.npz"
    if path.is_file():
        reference = read_reference(path)
        if reference.protocol == protocol:
            return reference
    running, running_spatial, kept = RunningStatistics(), RunningStatistics(), []
    stride = -(-len(source) // NUM_REAL_FEATURES)
    for start in range(0, len(source), IMAGES_AT_A_TIME):
        images, _ = source.read(np.arange(start, min(start + IMAGES_AT_A_TIME, len(source))))
        features = extractor(images, f"features of {source.name} from image {start}")
        running.add(features.pooled)
        kept.append(features.pooled[-start % stride :: stride])
        if features.spatial is not None:
            running_spatial.add(features.spatial)
    spatial = running_spatial.result() if running_spatial.count else None
    reference = Reference(running.result(), spatial, np.concatenate(kept), protocol)
    write_reference(path, reference)
    return reference


def file_reference(extractor: FeatureExtractor, path: str | Path, metrics: list[str]) -> Reference:
    """A reference file of ADM's kind; its images (`arr_0`), if it has any, serve precision, recall and KID.

    Raises FileNotFoundError, and ValueError for anything but a reference file of this network.
    """
    reference = read_reference(path)
    features, protocol = reference.features, {"file": Path(path).name} | reference.protocol
    if features is None and {"kid", "precision_recall"} & set(metrics):
        features = extractor(as_colour(read_samples(path)[0]), "features of the reference").pooled
    return Reference(reference.pooled, reference.spatial, features, protocol)


def sample_metrics(metrics: list[str], network: str, features: Features, reference: Reference) -> dict[str, Any]:
    """{name as it should be printed: figure} for the asked metrics of generated images' features.

    Scores over splits or subsets come with their standard deviation, as "… (std)". Raises ValueError for
    metrics that the network or the reference does not have, and for fewer images than features.
    """
    check_metrics(metrics, network)
    names, results = NAMES[network], {}
    for metric in metrics:
        name = names[metric]
        if metric == "fid":
            results[name] = _frechet(features.pooled, reference.pooled, name)
        elif metric == "sfid":
            if reference.spatial is None:
                raise UserError("the reference has no spatial statistics (mu_s, sigma_s), which sFID needs")
            results[name] = _frechet(features.spatial, reference.spatial, name)
        elif metric == "inception_score":
            results[name], results[f"{name} (std)"] = inception_score(features.logits)
        elif metric == "kid":
            results[name], results[f"{name} (std)"] = kernel_distance(features.pooled, _real_features(reference))
        else:
            both = precision_recall(features.pooled, _real_features(reference))
            results |= {name.format(kind): value for kind, value in zip(("precision", "recall"), both, strict=True)}
    return results


def _frechet(features: np.ndarray, reference: FeatureStatistics, name: str) -> float:
    number, size = features.shape
    if number < size:
        raise UserError(
            f"{name} has {size} features, so it needs at least {size} images, got {number}: fewer leave the "
            "covariance singular (the field draws 50,000)"
        )
    return frechet_distance(feature_statistics(features), reference)


def _real_features(reference: Reference) -> np.ndarray:
    if reference.features is None:
        raise UserError("the reference has no images, which the kernel distance, precision and recall need")
    return reference.features
