"""A saved model: a folder of config.json, model.safetensors, README.md and perhaps samples.png, all plain data.

config.json holds the layout's version, the model's config, its training noise, and the size and SHA-256 of
model.safetensors; a SHA-256 of its own fields makes any damage to either file an error, not another model.
model.safetensors holds "params/…", "ema/…" (where an average of the parameters was kept) and, in VP mode,
"prior/variance", by the names of `runtime.parameters.variables_shapes`.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from tarflow_jax.data.images import decode_image
from tarflow_jax.errors import UserError, one_line
from tarflow_jax.figures import save_png
from tarflow_jax.files import replacing, sha256
from tarflow_jax.flow.config import TarFlowConfig
from tarflow_jax.interop.hub import local_folder, push_folder
from tarflow_jax.interop.layout import check_tensors, flatten, unflatten
from tarflow_jax.interop.model_card import PICTURE, model_card
from tarflow_jax.interop.safetensors_file import CODES, read_tensors, write_tensors
from tarflow_jax.noise import Noise
from tarflow_jax.runtime.parameters import Shape, params_shapes, variables_shapes

FORMAT = "tarflow_jax"
VERSION = 1
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
STUDENT = "student"  # the folder of the model's student
_MAX_CONFIG_BYTES = 1 << 20
_MAX_BLOCKS = 1 << 12


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """What a model folder holds.

    Attributes:
      config: of the flow.
      variables: {"params": …} and, in VP mode, {"prior": {"variance": [T, D]}}; float32 arrays.
      noise: what it was trained with; None if unknown.
      ema_params: the parameters' exponential moving average, like variables["params"]; None if none was kept.
    """

    config: TarFlowConfig
    variables: dict[str, Any]
    noise: Noise | None = None
    ema_params: dict[str, Any] | None = None


def save_model(
    folder: str | os.PathLike[str],
    *,
    config: TarFlowConfig,
    variables: Mapping[str, Any],
    noise: Noise | None = None,
    ema_params: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    card: Mapping[str, Any] | None = None,
) -> None:
    """Writes a model folder; one tensor at a time, and nothing is replaced before all is written.

    Args:
      folder: made if it is missing. An earlier saved model in it is replaced.
      config, variables, noise, ema_params: as in `SavedModel`.
      dtype: of the saved parameters, "float32" (exact) or "bfloat16" (half the size). A prior stays float32.
      card: what the model card tells, see `model_card`.

    Raises ValueError: variables that are not of `config`, an unknown dtype or card field, or a folder whose config.json
    is something else.
    """
    folder = Path(folder)
    if dtype not in CODES:
        raise UserError(f"dtype is {dtype!r}; expected one of {', '.join(CODES)}")
    if (folder / CONFIG).exists() and "format" not in read_json(folder / CONFIG):
        raise UserError(f"{folder / CONFIG} belongs to something else than a saved model; choose another folder")
    tensors = flatten(variables) | flatten({"ema": ema_params} if ema_params else {})
    shapes = _shapes(config, ema_params is not None)
    check_tensors("the model", {name: array.shape for name, array in tensors.items()}, shapes)
    text, picture = model_card(config, noise, card or {}), _picture((card or {}).get("samples"))
    with (
        replacing(folder / WEIGHTS) as weights,
        replacing(folder / CONFIG) as description,
        replacing(folder / CARD) as readme,
    ):
        write_tensors(weights, {name: tensors[name] for name in shapes}, _dtypes(shapes, dtype))
        weights.flush()
        size, digest = weights.tell(), sha256(weights.name)
        fields = {
            "format": FORMAT,
            "format_version": VERSION,
            "model": config.to_dict(),
            "noise": noise.to_dict() if noise else None,
            "weights": {"dtype": dtype, "ema": ema_params is not None, "bytes": size, "sha256": digest},
        }
        fields["sha256"] = fingerprint(fields)
        description.write((json.dumps(fields, indent=2) + "\n").encode())
        readme.write(text.encode())
    if picture is None:
        (folder / PICTURE).unlink(missing_ok=True)  # of an earlier model
    else:
        save_png(folder / PICTURE, picture)


def push_model(folder: str | os.PathLike[str], name: str, *, private: bool = False, token: str | None = None) -> str:
    """Uploads a saved model to the hub; see `hub.push_folder`."""
    return push_folder(Path(folder), name, (CONFIG, WEIGHTS, CARD, PICTURE), private=private, token=token)


def load_model(name: str | os.PathLike[str]) -> SavedModel:
    """Reads a folder that `save_model` wrote, or the Hugging Face hub's model "owner/name" if there is no such folder.

    Raises:
      FileNotFoundError: neither a folder nor a hub model that can be reached, or a file of it is missing.
      ImportError: a hub model, but huggingface_hub is not installed.
      ValueError: an unknown layout version, a damaged file, or files that contradict each other.
    """
    folder = local_folder(name, (CONFIG, WEIGHTS, CARD, f"{STUDENT}/{CONFIG}", f"{STUDENT}/{WEIGHTS}"))
    path, weights = folder / CONFIG, folder / WEIGHTS
    fields = _read_fields(path)
    try:
        config = TarFlowConfig.from_dict(fields["model"])
        noise = None if fields["noise"] is None else Noise.from_dict(fields["noise"])
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: {one_line(error)}") from error
    stored = fields["weights"]
    check_weights_file(weights, stored)
    shapes = _shapes(config, stored["ema"])
    tensors = read_tensors(weights, shapes, _dtypes(shapes, stored["dtype"]))
    tree = unflatten({name: jnp.asarray(array.astype(jnp.float32, copy=False)) for name, array in tensors})
    return SavedModel(config=config, noise=noise, ema_params=tree.pop("ema", None), variables=tree)


def _picture(path: epath.PathLike | None) -> np.ndarray | None:
    """The pixels of the card's samples, uint8 [H, W, 3]; ValueError where the file is no image."""
    if path is None:
        return None
    try:
        return np.asarray(decode_image(epath.Path(path).read_bytes()))
    except (UserError, OSError) as error:
        raise UserError(
            f"the card's samples, {path}: {one_line(error)}; give card={{'samples': FILE}}, or None for none"
        ) from error


def _shapes(config: TarFlowConfig, ema: bool) -> dict[str, Shape]:
    shapes = variables_shapes(config)
    if ema:
        shapes |= {f"ema/{name}": shape for name, shape in params_shapes(config).items()}
    return shapes


def _dtypes(shapes: Mapping[str, Shape], dtype: str) -> dict[str, str]:
    return {name: "float32" if name.startswith("prior/") else dtype for name in shapes}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object that is not too large; FileNotFoundError, and ValueError for anything else."""
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}; expected a folder that save_pretrained wrote")
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise UserError(f"{path} has {path.stat().st_size} bytes, too many for a config")
    try:
        fields = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {one_line(error)}") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path} is not a JSON object; expected a folder that save_pretrained wrote")
    return fields


def _read_fields(path: Path) -> dict[str, Any]:
    """config.json, with the types of everything but the model and the noise checked."""
    fields = read_json(path)
    if fields.get("format") != FORMAT:
        raise UserError(f"{path} is not a saved model's; expected a folder that save_pretrained wrote")
    if fields.get("format_version") != VERSION:
        raise UserError(
            f"{path} has layout version {fields.get('format_version')!r}; this release reads {VERSION}:"
            " install the release that wrote it"
        )
    if fields.pop("sha256", None) != fingerprint(fields):
        raise UserError(f"{path} does not match its own checksum: it was damaged or edited; save the model again")
    stored = fields.get("weights")
    types = {"dtype": str, "ema": bool, "bytes": int, "sha256": str}
    if (
        fields.keys() != {"format", "format_version", "model", "noise", "weights"}
        or not isinstance(stored, dict)
        or {name: type(value) for name, value in stored.items()} != types
        or stored["dtype"] not in CODES
    ):
        raise UserError(f"{path} lacks fields of layout version {VERSION}, or has others; save the model again")
    # Before anything is as long as the number of blocks that the file claims.
    blocks = fields["model"].get("num_blocks") if isinstance(fields["model"], dict) else None
    if not isinstance(blocks, int) or blocks > _MAX_BLOCKS:
        raise UserError(f"{path} describes a model of {blocks!r} blocks; expected at most {_MAX_BLOCKS}")
    return fields


def fingerprint(fields: Mapping[str, Any]) -> str:
    """SHA-256, in hexadecimal, of fields as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def check_weights_file(path: Path, stored: Mapping[str, Any]) -> None:
    """Raises FileNotFoundError, or ValueError where a file is not of the bytes and sha256 that are stored of it."""
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}; copy the whole folder again")
    if path.stat().st_size != stored["bytes"]:
        raise UserError(f"{path} has {path.stat().st_size} bytes; expected {stored['bytes']}; copy it again")
    if sha256(path) != stored["sha256"]:
        raise UserError(f"{path} does not match its checksum in config.json: it is damaged; copy it again")
