"""Model folders: config.json, model.safetensors, README.md and, if there are any, samples.png and student/.

config.json describes the model. It holds the SHA-256 of model.safetensors and of its own fields, so that damage to
either file is an error, not another model. model.safetensors holds the variables by their paths: "params/…", "ema/…"
for averaged parameters, and "prior/variance" in VP mode. Both are validated as they are read, and neither can execute
code.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from etils import epath

from tarflow_jax.data.images import decode_image
from tarflow_jax.errors import UserError, one_line
from tarflow_jax.figures import save_png
from tarflow_jax.files import replacing, sha256, write_text
from tarflow_jax.fingerprint import fingerprint
from tarflow_jax.flow.config import TarFlowConfig
from tarflow_jax.interop.hub import local_folder
from tarflow_jax.interop.model_card import PICTURE, model_card
from tarflow_jax.interop.tensors import check_tensors, flatten, read_safetensors
from tarflow_jax.noise import Noise
from tarflow_jax.runtime.parameters import Shape, params_shapes, student_shapes, variables_shapes
from tarflow_jax.student import StudentConfig, TrainedStudent

FORMATS = {"model": "tarflow_jax", "student": "tarflow_jax student"}
VERSION = 1
CONFIG, WEIGHTS, CARD, STUDENT = "config.json", "model.safetensors", "README.md", "student"
_DTYPES = ("float32", "bfloat16")
_MAX_CONFIG_BYTES = 1 << 20
_MAX_BLOCKS = 1 << 12


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """A model, as it is saved and loaded.

    Attributes:
      config: the flow's shape.
      variables: {"params": …} and, in VP mode, {"prior": {"variance": [T, D]}}; float32 arrays.
      noise: the training noise; None if unknown.
      ema_params: exponential moving average of variables["params"], which is what users sample with; None if none
        was kept.
      card: fields of the model card, see `model_card`. It is written, but not read back.
    """

    config: TarFlowConfig
    variables: Mapping[str, Any]
    noise: Noise | None = None
    ema_params: Mapping[str, Any] | None = None
    card: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def save_model(
    folder: str | os.PathLike[str], model: SavedModel, *, dtype: str = "float32", student: TrainedStudent | None = None
) -> None:
    """Writes a model folder. Neither config.json nor model.safetensors is replaced before both are written.

    Args:
      folder: created if it is missing. A saved model in it is replaced.
      model: its card's evaluations are kept only if they were made with these very weights.
      dtype: of the saved parameters: "float32" (exact), or "bfloat16" (half the size). A prior stays float32.
        Evaluations and the student belong to the exact weights, so bfloat16 leaves them out.
      student: saved in student/; None removes the student of an earlier model.

    Raises ValueError: variables that do not fit the config, an unknown dtype or card field, a picture that cannot be
    read, or a folder whose config.json is not a saved model's.
    """
    folder, exact = Path(folder), dtype == "float32"
    if dtype not in _DTYPES:
        raise UserError(f"dtype is {dtype!r}; expected one of {', '.join(_DTYPES)}")
    if (folder / CONFIG).exists() and "format" not in _read_json(folder / CONFIG):
        raise UserError(f"{folder / CONFIG} is not a saved model's; choose another folder")
    card = {**model.card, "evaluations": _evaluations_of(model) if exact else []}
    text, picture = model_card(model.config, model.noise, card), _read_picture(card.get("samples"))
    description = {"model": model.config.to_dict(), "noise": model.noise.to_dict() if model.noise else None}
    variables = {**model.variables, **({"ema": model.ema_params} if model.ema_params else {})}
    _write(folder, "model", description, variables, _model_shapes(model.config, ema="ema" in variables), dtype)
    write_text(folder / CARD, text)
    if picture is not None:
        save_png(folder / PICTURE, picture)
    else:
        (folder / PICTURE).unlink(missing_ok=True)
    save_student(folder, student if exact else None)


def load_model(name: str | os.PathLike[str]) -> SavedModel:
    """Reads a folder that `save_model` wrote, or downloads the hub's model "owner/name" if there is no such folder.

    Raises:
      FileNotFoundError: neither a folder nor a hub model that can be reached, or one of its files is missing.
      ValueError: an unknown layout version, a damaged file, or files that contradict each other.
    """
    folder = local_folder(name)
    fields = _read_description(folder, "model")
    with _one_line_errors(folder / CONFIG):
        _check_num_blocks("model", fields["model"])
        config = TarFlowConfig.from_dict(fields["model"])
        noise = None if fields["noise"] is None else Noise.from_dict(fields["noise"])
        shapes = _model_shapes(config, fields["weights"]["ema"])
    tree = read_safetensors(folder / WEIGHTS, shapes)
    return SavedModel(config=config, noise=noise, ema_params=tree.pop("ema", None), variables=tree)


def save_student(folder: str | os.PathLike[str], student: TrainedStudent | None) -> None:
    """Writes a student into student/ of a model folder; None removes the one that is there."""
    folder = Path(folder) / STUDENT
    if student is None:
        for name in (CONFIG, WEIGHTS):
            (folder / name).unlink(missing_ok=True)
        return
    description = {"student": student.config.to_dict(), "flow": student.flow}
    _write(folder, "student", description, student.variables, student_shapes(student.config), "float32")


def load_student(name: str | os.PathLike[str]) -> TrainedStudent | None:
    """Reads the student of a model folder or of the hub's model "owner/name"; None if it has none.

    Raises ValueError as `load_model` does.
    """
    folder = local_folder(name) / STUDENT
    if not (folder / CONFIG).exists():
        return None
    fields = _read_description(folder, "student")
    with _one_line_errors(folder / CONFIG):
        _check_num_blocks("student", fields["student"]["flow"])
        config, flow = StudentConfig.from_dict(fields["student"]), str(fields["flow"])
    return TrainedStudent(config, read_safetensors(folder / WEIGHTS, student_shapes(config)), flow)


def _model_shapes(config: TarFlowConfig, ema: bool) -> dict[str, Shape]:
    averaged = {f"ema/{name}": shape for name, shape in params_shapes(config).items()} if ema else {}
    return variables_shapes(config) | averaged


def _evaluations_of(model: SavedModel) -> list[Mapping[str, Any]]:
    """Returns the card's evaluations that were made with this model's weights."""
    evaluations = model.card.get("evaluations", ())
    if not evaluations:
        return []
    weights = fingerprint({**model.variables, "params": model.ema_params or model.variables["params"]})
    return [each for each in evaluations if each["protocol"].get("fingerprint") == weights]


def _read_picture(path: epath.PathLike | None) -> np.ndarray | None:
    """Returns the pixels of the card's samples, uint8 [H, W, 3]; ValueError if the file is not an image."""
    if path is None:
        return None
    try:
        return np.asarray(decode_image(epath.Path(path).read_bytes()))
    except (UserError, OSError) as error:
        raise UserError(
            f"the card's samples, {path}: {one_line(error)}; give card={{'samples': FILE}}, or None for none"
        ) from error


def _write(
    folder: Path,
    what: str,
    description: Mapping[str, Any],
    variables: Mapping[str, Any],
    shapes: Mapping[str, Shape],
    dtype: str,
) -> None:
    """Writes model.safetensors and config.json, after checking the variables' names and shapes."""
    tensors = flatten(variables)
    check_tensors(f"the {what}", {name: array.shape for name, array in tensors.items()}, shapes)
    dtypes = {name: "float32" if name.startswith("prior/") else dtype for name in tensors}
    arrays = {name: np.asarray(value, jnp.dtype(dtypes[name]), order="C") for name, value in tensors.items()}
    with replacing(folder / WEIGHTS) as weights, replacing(folder / CONFIG) as config:
        safetensors.numpy.save_file(arrays, weights.name)
        os.chmod(weights.name, os.fstat(weights.fileno()).st_mode)  # safetensors makes it private to its owner
        fields = {
            "format": FORMATS[what],
            "format_version": VERSION,
            **description,
            "weights": {"dtype": dtype, "ema": "ema" in variables, "sha256": sha256(weights.name)},
        }
        fields["sha256"] = checksum(fields)
        config.write((json.dumps(fields, indent=2) + "\n").encode())


def _read_description(folder: Path, what: str) -> dict[str, Any]:
    """Reads config.json, and checks its format, its version, and both checksums."""
    path, weights = folder / CONFIG, folder / WEIGHTS
    fields = _read_json(path)
    if (fields.get("format"), fields.get("format_version")) != (FORMATS[what], VERSION):
        raise UserError(
            f"{path} is not a {what}'s of layout version {VERSION}; expected a folder that save_pretrained wrote"
        )
    if fields.pop("sha256", None) != checksum(fields):
        raise UserError(f"{path} does not match its own checksum: it was damaged or edited; save the model again")
    if not weights.is_file():
        raise FileNotFoundError(f"no {WEIGHTS} in {folder}; copy the whole folder again")
    with _one_line_errors(path):
        expected = fields["weights"]["sha256"]
    if sha256(weights) != expected:
        raise UserError(f"{weights} does not match its checksum in {CONFIG}: it is damaged; copy it again")
    return fields


def _read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object of limited size."""
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}; expected a folder that save_pretrained wrote")
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise UserError(f"{path} has {path.stat().st_size} bytes, too many for a config")
    try:
        fields = json.loads(path.read_bytes())
        if not isinstance(fields, dict):
            raise ValueError(f"it is a {type(fields).__name__}")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a JSON object: {one_line(error)}") from error
    return fields


@contextlib.contextmanager
def _one_line_errors(path: Path) -> Iterator[None]:
    """Turns whatever malformed fields raise into a UserError that names the file."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{path}: {one_line(error)}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} lacks fields of layout version {VERSION}, or some have another type ({one_line(error)}); "
            "save the model again"
        ) from error


def _check_num_blocks(what: str, shape: Mapping[str, Any]) -> None:
    """Bounds the number of blocks before the config allocates a tuple of that length."""
    if shape["num_blocks"] > _MAX_BLOCKS:
        raise UserError(f"it describes a {what} of {shape['num_blocks']} blocks; expected at most {_MAX_BLOCKS}")


def checksum(fields: Mapping[str, Any]) -> str:
    """Returns the SHA-256, in hexadecimal, of fields as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
