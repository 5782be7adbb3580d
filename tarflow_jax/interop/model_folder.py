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
import re
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
from tarflow_jax.interop.model_card import PICTURE, model_card
from tarflow_jax.interop.tensors import check_tensors, flatten, read_safetensors
from tarflow_jax.noise import Noise
from tarflow_jax.runtime.parameters import Shape, params_shapes, student_shapes, variables_shapes
from tarflow_jax.student import StudentConfig, TrainedStudent

FORMATS = {"model": "tarflow_jax", "student": "tarflow_jax student"}
VERSION = 1
CONFIG, WEIGHTS, CARD, STUDENT = "config.json", "model.safetensors", "README.md", "student"
_DTYPES = ("float32", "bfloat16")
_MAX_BLOCKS, _MAX_CONFIG_BYTES = 1 << 12, 1 << 20
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# Everything that a model folder may hold; no other file is downloaded or uploaded.
FILES = [CONFIG, WEIGHTS, CARD, PICTURE, "decoder.json", f"{STUDENT}/{CONFIG}", f"{STUDENT}/{WEIGHTS}"]


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """A model, as it is saved and loaded; all arrays are float32."""

    config: TarFlowConfig
    variables: Mapping[str, Any]  # {"params": …} and, in VP mode, {"prior": {"variance": [T, D]}}
    noise: Noise | None = None  # of the training; None if unknown
    ema_params: Mapping[str, Any] | None = None  # moving average of the params, which users sample with, if any
    card: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # see `model_card`; not read back


def save_model(
    folder: str | os.PathLike[str], model: SavedModel, *, dtype: str = "float32", student: TrainedStudent | None = None
) -> None:
    """Writes a model folder. Neither config.json nor model.safetensors is replaced before both are written.

    A saved model in the folder is replaced, its student too. Parameters are saved as float32 (exact) or bfloat16 (half
    the size), a prior as float32. Evaluations and the student belong to the exact weights, so bfloat16 leaves them out.

    Raises ValueError: variables that do not fit the config, an unknown dtype or card field, a picture that cannot be
    read, or a folder whose config.json is not a saved model's.
    """
    folder, exact = Path(folder), dtype == "float32"
    if dtype not in _DTYPES:
        raise UserError(f"dtype is {dtype!r}; expected one of {', '.join(_DTYPES)}")
    with _config_errors(folder / CONFIG):
        if (folder / CONFIG).exists() and "format" not in json.loads((folder / CONFIG).read_bytes()):
            raise UserError("it is not a saved model's; choose another folder")
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
    with _config_errors(folder / CONFIG):
        fields = _read_config(folder, "model")
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
    """Reads the student of a model folder or of the hub's model "owner/name", as `load_model`; None if it has none."""
    folder = local_folder(name) / STUDENT
    if not (folder / CONFIG).exists():
        return None
    with _config_errors(folder / CONFIG):
        fields = _read_config(folder, "student")
        config, flow = StudentConfig.from_dict(fields["student"]), str(fields["flow"])
    return TrainedStudent(config, read_safetensors(folder / WEIGHTS, student_shapes(config)), flow)


def _model_shapes(config: TarFlowConfig, ema: bool) -> dict[str, Shape]:
    averaged = {f"ema/{name}": shape for name, shape in params_shapes(config).items()} if ema else {}
    return variables_shapes(config) | averaged


def _evaluations_of(model: SavedModel) -> list[Mapping[str, Any]]:
    evaluations = model.card.get("evaluations", ())
    if not evaluations:
        return []
    weights = fingerprint({**model.variables, "params": model.ema_params or model.variables["params"]})
    return [each for each in evaluations if each["protocol"].get("fingerprint") == weights]


def _read_picture(path: epath.PathLike | None) -> np.ndarray | None:
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
    tensors = flatten(variables)
    check_tensors(f"the {what}", {name: array.shape for name, array in tensors.items()}, shapes)
    arrays = {}
    for name, value in tensors.items():
        exact = name.startswith("prior/")
        arrays[name] = np.asarray(value, jnp.dtype("float32" if exact else dtype), order="C")
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


def _read_config(folder: Path, what: str) -> dict[str, Any]:
    """Reads config.json, and checks its format, its version, both checksums, and the number of blocks."""
    path, weights = folder / CONFIG, folder / WEIGHTS
    for file in (path, weights):
        if not file.is_file():
            raise FileNotFoundError(f"no {file.name} in {folder}; expected a folder that save_pretrained wrote")
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise UserError(f"it has more than {_MAX_CONFIG_BYTES} bytes; expected what save_pretrained wrote")
    fields = json.loads(path.read_bytes())
    if (fields.get("format"), fields.get("format_version")) != (FORMATS[what], VERSION):
        raise UserError(f"it is not a {what}'s of layout version {VERSION}; expected what save_pretrained wrote")
    if fields.pop("sha256", None) != checksum(fields):
        raise UserError("it does not match its own checksum: it was damaged or edited; save the model again")
    if sha256(weights) != fields["weights"]["sha256"]:
        raise UserError(f"{WEIGHTS} does not match the checksum in it: one is damaged; copy the folder again")
    num_blocks = (fields["model"] if what == "model" else fields["student"]["flow"])["num_blocks"]
    if num_blocks > _MAX_BLOCKS:  # before the config allocates a tuple of that length
        raise UserError(f"it describes a {what} of {num_blocks} blocks; expected at most {_MAX_BLOCKS}")
    return fields


@contextlib.contextmanager
def _config_errors(path: Path) -> Iterator[None]:
    """Raises whatever a malformed config.json leads to as a UserError that names the file."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{path}: {one_line(error)}") from error
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} lacks fields of layout version {VERSION}, or some have another type ({one_line(error)}); "
            "save the model again"
        ) from error


def checksum(fields: Mapping[str, Any]) -> str:
    """Returns the SHA-256, in hexadecimal, of fields as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def local_folder(name: str | os.PathLike[str]) -> Path:
    """Returns the folder `name`, or else downloads the hub's model "owner/name" and returns the copy's folder.

    Raises FileNotFoundError: there is no such folder, and no such model on the hub or no network.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.exists() or not _HUB_NAME.fullmatch(str(name)):
        raise FileNotFoundError(f"no folder {name}; give a saved model's folder, or owner/name on the hub")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(str(name), allow_patterns=FILES))
    except Exception as error:  # the hub's errors share no base class with those of its HTTP library
        raise FileNotFoundError(
            f"no folder {name}, and the hub did not return a model of that name (is there a network?): "
            f"{one_line(error)}"
        ) from error


def push_model(folder: str | os.PathLike[str], name: str, *, private: bool = False, token: str | None = None) -> str:
    """Uploads a model folder to the hub as "owner/name", in one commit, and returns the commit's URL.

    Creates the repository, perhaps private, if it is missing. Without a token, that of `hf auth login` or of HF_TOKEN
    is used. Raises ValueError: not a hub name, or the hub refused.
    """
    if not _HUB_NAME.fullmatch(name):
        raise UserError(f"{name!r} is not the name of a model on the hub; expected owner/name")
    import huggingface_hub

    api = huggingface_hub.HfApi(token=token)
    try:
        api.create_repo(name, private=private, exist_ok=True)
        message = "Upload by tarflow_jax"
        commit = api.upload_folder(repo_id=name, folder_path=str(folder), allow_patterns=FILES, commit_message=message)
    except Exception as error:  # the hub's errors share no base class with those of its HTTP library
        raise UserError(
            f"the hub did not accept {name} ({one_line(error)}); check the network, and that `hf auth login` was given "
            "a token with write access"
        ) from error
    return str(commit.commit_url)
