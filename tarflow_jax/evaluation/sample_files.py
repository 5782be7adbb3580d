"""The files of the field: ADM's npz of samples, and npz of reference statistics."""

import dataclasses
import json
import re
from typing import Any

import numpy as np
from etils import epath

from tarflow_jax.errors import UserError
from tarflow_jax.evaluation.statistics import FeatureStatistics
from tarflow_jax.files import read_npz, write_npz

MAX_STATISTICS_BYTES = 128 * 2**20  # 10,000 x 2048 float32 features take 79 MiB


def file_stem(*parts: str) -> str:
    """A file name made of parts such as a data set's name, "folder:/data/cats": letters, digits, dots, dashes."""
    return "-".join(re.sub(r"[^\w.]+", "_", part).strip("_") for part in parts)


def write_samples(path: epath.PathLike, images: np.ndarray, labels: np.ndarray | None = None) -> None:
    """ADM's sample file: `arr_0` uint8 [N, H, W, 3] (grey is repeated), and `arr_1` labels where there are any."""
    arrays = {"arr_0": as_colour(images)}
    if labels is not None:
        arrays["arr_1"] = labels
    write_npz(path, **arrays)


def read_samples(path: epath.PathLike) -> tuple[np.ndarray, np.ndarray | None]:
    """Images uint8 [N, H, W, K] and labels [N] or None of an ADM sample file.

    Raises FileNotFoundError, and ValueError for anything but a complete sample file.
    """
    arrays = read_npz(path, ("arr_0", "arr_1"))
    images, labels = arrays.get("arr_0"), arrays.get("arr_1")
    if images is None or images.ndim != 4 or images.dtype != np.uint8 or images.shape[-1] not in (1, 3):
        found = "nothing" if images is None else f"{images.dtype} {list(images.shape)}"
        raise UserError(f"{path}: expected arr_0 as uint8 [N, H, W, 1 or 3], found {found}")
    if labels is not None and (labels.shape != (len(images),) or labels.dtype.kind not in "iu"):
        raise UserError(f"{path}: expected arr_1 as {len(images)} integer labels, found {list(labels.shape)}")
    return images, labels


def as_colour(images: np.ndarray) -> np.ndarray:
    """[N, H, W, 1 or 3] -> [N, H, W, 3], what Inception and ADM's files want."""
    return np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images


@dataclasses.dataclass(frozen=True)
class Reference:
    """The real side of a distance."""

    pooled: FeatureStatistics  # of the pooled features of a whole split
    spatial: FeatureStatistics | None  # of the spatial ones, for sFID
    features: np.ndarray | None  # pooled ones of some of the images, float32 [M, D]
    protocol: dict[str, Any]  # what these are of; empty for files of others, which do not say how images were prepared


def write_reference(path: epath.PathLike, reference: Reference) -> None:
    """Reference statistics as ADM stores them (`mu`, `sigma`, `mu_s`, `sigma_s`); `features` in place of
    ADM's images, and `protocol` as JSON, are ours."""
    arrays = {"mu": reference.pooled.mean, "sigma": reference.pooled.covariance}
    if reference.spatial is not None:
        arrays |= {"mu_s": reference.spatial.mean, "sigma_s": reference.spatial.covariance}
    if reference.features is not None:
        arrays["features"] = reference.features
    write_npz(path, **arrays, protocol=np.array(json.dumps(reference.protocol)))


def read_reference(path: epath.PathLike) -> Reference:
    """A reference file, ours or ADM's.

    Raises FileNotFoundError, and ValueError for anything else.
    """
    names = ("mu", "sigma", "mu_s", "sigma_s", "features", "protocol")
    arrays = read_npz(path, names, MAX_STATISTICS_BYTES)
    if not {"mu", "sigma"} <= arrays.keys():
        raise UserError(f"{path} holds no reference statistics: expected arrays mu and sigma")
    try:
        pooled = _statistics(arrays["mu"], arrays["sigma"])
        spatial = _statistics(arrays["mu_s"], arrays["sigma_s"]) if {"mu_s", "sigma_s"} <= arrays.keys() else None
        protocol = json.loads(str(arrays["protocol"])) if "protocol" in arrays else {}
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error
    features = arrays.get("features")
    if features is not None and features.shape[1:] != pooled.mean.shape:
        raise UserError(f"{path}: features {list(features.shape)} do not fit mu {list(pooled.mean.shape)}")
    return Reference(pooled, spatial, features, protocol)


def _statistics(mean: np.ndarray, covariance: np.ndarray) -> FeatureStatistics:
    return FeatureStatistics(mean.astype(np.float64), covariance.astype(np.float64))
