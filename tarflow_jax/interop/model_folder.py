"""Model folders: config.json, model.safetensors, README.md and, optionally, samples.png and student/.

config.json describes the model. It holds the SHA-256 of model.safetensors and of its own fields, so that damage to
either file is an error, not another model. model.safetensors holds the variables by their paths: "params/…", "ema/…"
for averaged parameters, and "prior/variance" in VP mode. Both are validated as they are read, and neither can execute
code.
"""

import atexit
import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from etils import epath

from tarflow_jax.data.images import decode_image
from tarflow_jax.errors import UserError, one_line
from tarflow_jax.figures import to_pil
from tarflow_jax.files import is_remote, naming, replacing, sha256
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
READY_MADE = (
    "digits",
    "digits_likelihood",
    "fashion_mnist",
    "fashion_mnist_likelihood",
    "emoji64",
    "emoji64_text",
    "two_moons",
)
HUB_OWNER = "tarflow-jax"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# Everything that a model folder may hold; no other file is downloaded or uploaded.
FILES = [CONFIG, WEIGHTS, CARD, PICTURE, f"{STUDENT}/{CONFIG}", f"{STUDENT}/{WEIGHTS}"]
TEXT_TO_IMAGE = "text_to_image.json"  # of folders that also hold the encoders and decoder around a flow of latents
FILES += [TEXT_TO_IMAGE, f"autoencoder/{CONFIG}", "autoencoder/diffusion_pytorch_model.safetensors"]
FILES += ["text/encoder.json", "text/words.safetensors"]


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """A model as saved and loaded; all arrays are float32."""

    config: TarFlowConfig
    variables: Mapping[str, Any]  # {"params": …} and, in VP mode, {"prior": {"variance": [T, D]}}
    noise: Noise | None = None  # the training noise; None if unknown
    ema_params: Mapping[str, Any] | None = None  # moving average of the params, used for sampling if present
    card: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # see `model_card`; not read back
    label_names: tuple[str, ...] = ()  # names of the classes; () if unknown


def save_model(
    folder: str | os.PathLike[str], model: SavedModel, *, dtype: str = "float32", student: TrainedStudent | None = None
) -> None:
    """Writes a model folder, on a disk or in an object store: all of its files, or none if one cannot be written.

    Replaces a saved model in the folder, with its student, but no other files. Parameters are
    saved as float32 (exact) or bfloat16 (half the size), a prior as float32. Evaluations and the student belong to the
    exact weights, so bfloat16 leaves them out.

    Raises ValueError: variables that do not fit the config, an unknown dtype or card field, an unreadable picture, a
    path that is a file, or a folder with other files that have a model file's name.
    """
    is_exact = dtype == "float32"
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype is {dtype!r}; expected float32 or bfloat16")
    card = {**model.card, "evaluations": _evaluations_of(model) if is_exact else []}
    text, picture = model_card(model.config, model.noise, card), _read_picture(card.get("samples"))
    noise = model.noise.to_dict() if model.noise else None
    fields: dict[str, Any] = {"model": model.config.to_dict(), "noise": noise, "label_names": list(model.label_names)}
    variables = {**model.variables, **({"ema": model.ema_params} if model.ema_params else {})}
    shapes = _model_shapes(model.config, ema="ema" in variables)
    with local_target(folder) as target:
        replaceable = _replaceable(target, picture is not None)
        target.mkdir(parents=True, exist_ok=True)
        with naming(target), tempfile.TemporaryDirectory(prefix=".saving_", dir=target) as temporary:
            new = Path(temporary)
            _write(new, "model", fields, variables, shapes, dtype)
            (new / CARD).write_text(text)
            if picture is not None:
                to_pil(picture).save(new / PICTURE)
            if student is not None and is_exact:
                of_student = {"student": student.config.to_dict(), "flow": student.flow}
                _write(new / STUDENT, STUDENT, of_student, student.variables, student_shapes(student.config), "float32")
            for name in FILES:  # nothing can fail any more for lack of space
                if (new / name).exists():
                    (target / name).parent.mkdir(exist_ok=True)
                    (new / name).replace(target / name)
                elif name in replaceable:
                    (target / name).unlink()
        with contextlib.suppress(OSError):  # there is none, or it is not empty
            (target / STUDENT).rmdir()


@contextlib.contextmanager
def local_target(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a local folder to save a model in: `folder`, or a copy of one in an object store, uploaded at the end."""
    if not is_remote(check_path(folder)):
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory() as local:
        copy_model(folder, local)  # so that what is there is replaced, or refused, as on a disk
        try:
            yield Path(local)
        except UserError as error:
            raise UserError(str(error).replace(local, os.fspath(folder))) from error
        copy_model(local, folder)


def check_path(path: Any) -> Any:
    """Returns a path unchanged; raises UserError if it is not a path, or "", which would be the current folder."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise UserError(f"the model's folder is {path!r}; expected a path")
    return path


def _replaceable(folder: Path, picture: bool) -> set[str]:
    """Returns the file names of the saved model in a folder; raises UserError if other files would be replaced."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; choose another name for the folder")
    others = {name for name in (*FILES, STUDENT) if os.path.lexists(folder / name)}
    replaceable: set[str] = set()
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        if json.loads((folder / CONFIG).read_bytes())["format"] == FORMATS["model"]:
            replaceable = others - {PICTURE}
            if f"({PICTURE})" in (folder / CARD).read_text(errors="replace"):
                replaceable |= {PICTURE} & others
    others -= replaceable
    if others and (picture or not replaceable):
        raise UserError(f"{folder} holds {min(others)}, which is not a saved model's; choose another folder")
    return replaceable


def load_model(name: str | os.PathLike[str]) -> SavedModel:
    """Reads a folder that `save_model` wrote, a ready-made model by name, or the hub's model "owner/name".

    Raises:
      FileNotFoundError: no such folder and no such hub model that can be reached, or a file is missing.
      ValueError: an unknown layout version, a damaged file, or files that contradict each other.
    """
    folder = local_folder(name)
    with _config_errors(folder / CONFIG):
        fields = _read_config(folder, "model")
        config = TarFlowConfig.from_dict(fields["model"])
        noise = None if fields["noise"] is None else Noise.from_dict(fields["noise"])
        shapes = _model_shapes(config, fields["weights"]["ema"])
        names = tuple(map(str, fields.get("label_names", ())))
        if names and len(names) != config.num_classes:
            raise UserError(f"it names {len(names)} classes; expected {config.num_classes}")
    tree = read_safetensors(folder / WEIGHTS, shapes)
    return SavedModel(config=config, noise=noise, ema_params=tree.pop("ema", None), variables=tree, label_names=names)


def load_student(name: str | os.PathLike[str]) -> TrainedStudent | None:
    """Reads the student of a model that `load_model` finds by this name; returns None if it has none."""
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
        advice = "give card={'samples': FILE}, or None for none"
        raise UserError(f"the card's samples, {path}: {one_line(error)}; {advice}") from error


def _write(
    folder: Path, what: str, fields: dict[str, Any], variables: Mapping[str, Any], shapes: dict[str, Shape], dtype: str
) -> None:
    """Writes config.json, with `fields`, and model.safetensors into a new folder."""
    tensors = flatten(variables)
    check_tensors(f"the {what}", {name: array.shape for name, array in tensors.items()}, shapes)
    arrays = {}
    for name, value in tensors.items():
        is_exact = name.startswith(("prior/", "constants/"))
        arrays[name] = np.asarray(value, jnp.dtype("float32" if is_exact else dtype), order="C")
    folder.mkdir(exist_ok=True)
    weights, config = folder / WEIGHTS, folder / CONFIG
    try:
        safetensors.numpy.save_file(arrays, weights)
    except safetensors.SafetensorError as error:
        raise UserError(f"{weights} cannot be written: {one_line(error)}") from error
    fields = {"format": FORMATS[what], "format_version": VERSION, **fields}
    fields["weights"] = {"dtype": dtype, "ema": "ema" in variables, "sha256": sha256(weights)}
    fields["sha256"] = checksum(fields)
    config.write_text(json.dumps(fields, indent=2) + "\n")
    weights.chmod(config.stat().st_mode)  # safetensors makes it private to its owner


def _read_config(folder: Path, what: str) -> dict[str, Any]:
    """Reads config.json, and checks its format, its version and both checksums."""
    path, weights = folder / CONFIG, folder / WEIGHTS
    for file in (path, weights):
        if not file.is_file():
            raise FileNotFoundError(f"no {file.name} in {folder}; expected a folder that save_pretrained wrote")
    fields = json.loads(path.read_bytes())
    if (fields.get("format"), fields.get("format_version")) != (FORMATS[what], VERSION):
        raise UserError(f"it is not a {what}'s of layout version {VERSION}; expected what save_pretrained wrote")
    if fields.pop("sha256", None) != checksum(fields):
        raise UserError("it does not match its own checksum: it was damaged or edited; save the model again")
    if sha256(weights) != fields["weights"]["sha256"]:
        raise UserError(f"{WEIGHTS} does not match the checksum in it: one is damaged; copy the folder again")
    return fields


@contextlib.contextmanager
def _config_errors(path: Path) -> Iterator[None]:
    """Turns any error from a malformed config.json into a UserError that names the file."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{path}: {one_line(error)}") from error
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"lacks fields of layout version {VERSION}, or some have another type ({one_line(error)})"
        raise UserError(f"{path} {reason}; save the model again") from error


def checksum(fields: Mapping[str, Any]) -> str:
    """Returns the hexadecimal SHA-256 of fields as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def shipped(pattern: str) -> dict[str, Path]:
    """Returns matching files in a clone's models/ or in the package tarflow_jax_models, by their folders' names."""
    package = importlib.util.find_spec("tarflow_jax_models")
    places = [Path(__file__).parents[2] / "models", *(package.submodule_search_locations or () if package else ())]
    return {file.parent.name: file for place in places for file in sorted(Path(place).glob(pattern))}


def ready_made() -> dict[str, Path]:
    """Returns the folders of the ready-made models by name."""
    return {name: file.parent for name, file in shipped(f"*/{CONFIG}").items()}


def local_folder(name: str | os.PathLike[str]) -> Path:
    """Returns the local folder of a model: `name` itself, a ready-made model's, or a copy from gs://… or the hub.

    A folder without a model, as commands make for samples, does not hide the model of that name. A ready-made model
    that is neither in a clone nor in an installed package comes from `HUB_OWNER` on the hub.

    Raises FileNotFoundError: there is no such folder, and no such model on the hub, or no network.
    """
    if is_remote(check_path(name)):
        if not (epath.Path(name) / CONFIG).exists():
            raise FileNotFoundError(f"no {CONFIG} in {name}; expected a folder that save_pretrained wrote")
        copy = Path(tempfile.mkdtemp(prefix="tarflow_jax_"))
        atexit.register(shutil.rmtree, copy, ignore_errors=True)
        copy_model(name, copy)
        return copy
    folder, name, models = Path(name), str(name), ready_made()
    if (folder / CONFIG).exists():
        return folder
    if name in models:
        return models[name]
    if name in READY_MADE:
        return local_folder(f"{HUB_OWNER}/{name}")
    reason = f"; give a saved model's folder, owner/name on the hub, or one of {', '.join(READY_MADE)}"
    if _HUB_NAME.fullmatch(name):
        import huggingface_hub

        try:
            copy = Path(huggingface_hub.snapshot_download(name, allow_patterns=FILES))
        except Exception as error:  # the hub's errors share no base class with those of its HTTP library
            reason = f", and the hub returned no model of that name (is there a network?): {one_line(error)}"
        else:
            if not (copy / CONFIG).exists():
                raise FileNotFoundError(f"{name} on the hub has no {CONFIG}; expected what push_to_hub uploaded")
            return copy
    if folder.is_dir():
        return folder
    raise FileNotFoundError(f"no folder {name}{reason}")


def copy_model(source: epath.PathLike, target: epath.PathLike) -> None:
    """Copies a model folder from or to an object store, config.json last; removes files that the source lacks."""
    source, target = epath.Path(source), epath.Path(target)
    for name in reversed(FILES):
        if (source / name).exists():
            with replacing(target / name) as file:
                file.write((source / name).read_bytes())
        else:
            (target / name).unlink(missing_ok=True)


def push_model(
    save: Callable[..., None], name: str, *, private: bool = False, token: str | None = None, **options: Any
) -> str:
    """Uploads a model to the hub as "owner/name", in one commit, and returns the commit's URL.

    Args:
      save: writes the model's folder, such as `TarFlowPipeline.save_pretrained`.
      name: the repository, which is created if it is missing.
      private: whether a new repository is private.
      token: None is the one of `hf auth login` or HF_TOKEN.
      options: of `save`, such as dtype and card.

    Raises:
      ValueError: an invalid name, or the hub refused.
    """
    if not _HUB_NAME.fullmatch(name):
        raise UserError(f"{name!r} is not the name of a model on the hub; expected owner/name")
    import huggingface_hub

    with tempfile.TemporaryDirectory() as folder:
        save(folder, **options | {"card": {"name": name, **(options.get("card") or {})}})
        try:
            api = huggingface_hub.HfApi(token=token)
            api.create_repo(name, private=private, exist_ok=True)
            # Deletes the files of an older model.
            commit = api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=FILES, delete_patterns=FILES)
        except Exception as error:  # the hub's errors share no base class with those of its HTTP library
            advice = "check the network, and that `hf auth login` was given a token with write access"
            raise UserError(f"the hub did not accept {name} ({one_line(error)}); {advice}") from error
    return str(commit.commit_url)
