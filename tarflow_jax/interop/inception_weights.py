"""FID's InceptionV3 from its PyTorch file, as Flax parameters with batch normalization folded in."""

from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from tarflow_jax.errors import UserError, one_line
from tarflow_jax.files import sha256

# The name of the published file, pt_inception-2015-12-05-6726825d.pth, contains the start of its SHA-256.
PUBLISHED_HASH_PREFIX = "6726825d"
BATCH_NORM_EPSILON = 1e-3


def load_inception_weights(path: str | Path) -> tuple[dict[str, Any], str]:
    """Reads a PyTorch state dict of FID's InceptionV3; executes no code in it.

    Returns:
      (parameters, SHA-256 of the file): a tree of float32 arrays with the file's names, for
      `evaluation.inception.InceptionV3`. A hash that does not start with `PUBLISHED_HASH_PREFIX` means weights other
      than those behind published FIDs.

    Raises FileNotFoundError, and ValueError for any other file.
    """
    import torch

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Inception weights {path} not found: name the local file pt_inception-2015-12-05.pth")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        state = {name: tensor.double().numpy() for name, tensor in loaded.items()}
    except Exception as error:  # damaged bytes can raise anything in its reader
        raise UserError(f"{path} is not a PyTorch file of named tensors ({one_line(error)})") from error
    try:
        convolutions = [name.removesuffix(".conv.weight") for name in state if name.endswith(".conv.weight")]
        params: dict[str, Any] = {name: _fold_batch_norm(state, name) for name in convolutions}
        params["fc"] = {"kernel": np.float32(state["fc.weight"]).T}
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} does not hold FID's InceptionV3: no such tensor {one_line(error)}") from error
    return unflatten_dict(params, sep="."), sha256(path)


def _fold_batch_norm(state: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """Folds batch normalization into the convolution before it; returns a kernel [h, w, I, O] and a bias, float32."""
    bias, mean, variance = (state[f"{name}.bn.{part}"] for part in ("bias", "running_mean", "running_var"))
    scale = state[f"{name}.bn.weight"] / np.sqrt(variance + BATCH_NORM_EPSILON)
    kernel = np.einsum("oihw,o->hwio", state[f"{name}.conv.weight"], scale)
    return {"kernel": kernel.astype(np.float32), "bias": (bias - mean * scale).astype(np.float32)}
