"""The PyTorch file of FID's InceptionV3, read safely and folded into Flax parameters."""

from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from tarflow_jax.errors import UserError, one_line
from tarflow_jax.files import sha256

# The published file, pt_inception-2015-12-05, carries the start of its own hash in its name.
PUBLISHED_HASH_PREFIX = "6726825d"
BATCH_NORM_EPSILON = 1e-3


def load_inception_weights(path: str | Path) -> tuple[dict[str, Any], str]:
    """Read a PyTorch state dict of FID's InceptionV3; returns (parameters, SHA-256 of the file).

    The parameters are a tree of float32 arrays named as in the file, for `evaluation.inception.InceptionV3`; batch
    normalisation (epsilon 1e-3) is folded in float64. Nothing in the file is executed (`weights_only`). A hash that
    does not start with `PUBLISHED_HASH_PREFIX` means other weights than those behind published FIDs; whoever prints the
    distance says so. Raises FileNotFoundError, and ValueError for a file of anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Inception weights {path} not found: name the local file pt_inception-2015-12-05.pth")
    state = _read_state(path)
    params: dict[str, Any] = {"fc": {"kernel": np.float32(_take(state, "fc.weight", path)).T}}
    for name in [key.removesuffix(".conv.weight") for key in state if key.endswith(".conv.weight")]:
        params[name] = _fold_batch_norm(state, name, path)
    return unflatten_dict(params, sep="."), sha256(path)


def _read_state(path: Path) -> dict[str, np.ndarray]:
    import torch

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        return {name: tensor.numpy() for name, tensor in loaded.items()}
    except Exception as error:  # torch raises whatever its unpickler meets
        raise UserError(f"{path} is not a PyTorch file of named tensors ({one_line(error)})") from error


def _take(state: dict[str, np.ndarray], name: str, path: Path) -> np.ndarray:
    if name not in state:
        raise UserError(f"{path} does not hold FID's InceptionV3: tensor {name} is missing")
    return state[name].astype(np.float64)


def _fold_batch_norm(state: dict[str, np.ndarray], name: str, path: Path) -> dict[str, np.ndarray]:
    """Convolution [O, I, h, w] and batch norm as one HWIO kernel and a bias, float32."""
    kernel = _take(state, f"{name}.conv.weight", path)
    weight, bias, mean, variance = (
        _take(state, f"{name}.bn.{part}", path) for part in ("weight", "bias", "running_mean", "running_var")
    )
    scale = weight / np.sqrt(variance + BATCH_NORM_EPSILON)
    if kernel.ndim != 4 or scale.shape != kernel.shape[:1]:
        raise UserError(f"{path} does not hold FID's InceptionV3: layer {name} has shape {kernel.shape}")
    kernel = (kernel * scale[:, None, None, None]).transpose(2, 3, 1, 0)
    return {"kernel": kernel.astype(np.float32), "bias": (bias - mean * scale).astype(np.float32)}
