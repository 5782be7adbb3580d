"""Opens the checkpoints in a run's workdir as models, and records the run's starts and results."""

import contextlib
import datetime
import json
import logging
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from tarflow_jax.errors import UserError, one_line
from tarflow_jax.files import write_text
from tarflow_jax.interop import SavedModel
from tarflow_jax.runtime import environment, make_mesh
from tarflow_jax.student import TrainedStudent
from tarflow_jax.training.checkpoint import Checkpoints
from tarflow_jax.training.metrics import last_step
from tarflow_jax.training.recipe import Recipe, label_names
from tarflow_jax.training.step import abstract_state

RESULTS, STUDENT, STARTS = "results.json", "student", "starts.jsonl"
_SAMPLES = ("samples_guided.png", "samples_denoised.png", "samples_raw.png")  # the card shows the first that exists
logger = logging.getLogger(__name__)


def read_workdir(workdir: epath.PathLike, mesh: Mesh | None = None, *, best: bool = False) -> SavedModel:
    """Reads the last intact checkpoint, or the one with the lowest test loss, onto `mesh` or the default device.

    Skips the optimizer's state. Raises FileNotFoundError if there is no config or no checkpoint; see also
    `Checkpoints.restore`.
    """
    workdir = epath.Path(workdir)
    recipe = Recipe.from_workdir(workdir)
    if recipe.autoencoder:
        raise UserError(f"{workdir} holds an autoencoder; expected a flow's workdir or a saved model")
    if recipe.student:
        raise UserError(f"{workdir} holds a student; open the workdir of its flow, {workdir.parent}")
    step, model = _restored(recipe, workdir, mesh, best=best)
    card, names = _card(recipe, workdir, step), tuple(label_names(workdir))
    names = names if len(names) == recipe.model.num_classes else ()  # an unconditional flow's images may have labels
    return SavedModel(config=recipe.model, noise=recipe.noise, **model, card=card, label_names=names)


def read_student(workdir: epath.PathLike, mesh: Mesh | None = None) -> TrainedStudent | None:
    """Reads a flow's student from its last intact checkpoint; None if there is none. Raises as `read_workdir`."""
    folder = epath.Path(workdir) / STUDENT
    if not (folder / "checkpoints").is_dir():
        return None
    recipe = Recipe.from_workdir(folder)
    if recipe.student is None:
        raise UserError(f"{folder} holds a flow; expected a student, which launch.distill keeps there")
    _, model = _restored(recipe, folder, mesh, best=False)
    variables = {"params": model["ema_params"]} if model["ema_params"] else model["variables"]
    return TrainedStudent(recipe.student, variables, recipe.config.student.flow)


def _restored(recipe: Recipe, workdir: epath.Path, mesh: Mesh | None, *, best: bool) -> tuple[int, dict[str, Any]]:
    """Returns a checkpoint's step, and its variables and averaged parameters."""
    state = abstract_state(recipe.train_config, mesh or make_mesh(devices=jax.local_devices()[:1]))
    wanted = {"variables": state.variables, "ema_params": state.ema_params}
    with contextlib.closing(Checkpoints(workdir / "checkpoints")) as checkpoints:
        found = checkpoints.restore(wanted, best=best, partial=True)
    if found is None:
        raise FileNotFoundError(f"{workdir} holds no checkpoint yet; train until train.checkpoint_every first")
    fields, reached = recipe.config.train, last_step(workdir)
    due = reached if reached == fields.num_steps else reached - reached % fields.checkpoint_every
    if found[0] < due and not best:
        message = "%s: opened checkpoint %d; that of step %d, which the run reached, is missing, damaged or unfinished"
        logger.warning(message, workdir, found[0], due)
    return found


def write_start(workdir: epath.PathLike, step: int) -> None:
    """Appends a line to starts.jsonl: the steps taken so far, the time, and the `environment`."""
    path = epath.Path(workdir) / STARTS
    earlier = path.read_bytes().decode(errors="replace") if path.exists() else ""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write_text(path, earlier + json.dumps({"step": step, "time": now, **environment()}) + "\n")


def write_results(workdir: epath.PathLike, results: dict[str, float]) -> None:
    """Writes a finished run's results, for its model card."""
    write_text(epath.Path(workdir) / RESULTS, json.dumps(results) + "\n")


def _card(recipe: Recipe, workdir: epath.Path, step: int) -> dict[str, Any]:
    fields, names = recipe.config.train, label_names(workdir)
    training = {"classes": ", ".join(names)} if names else {}
    evaluations = [_read_whole(path, _evaluation) for path in sorted((workdir / "evaluation").glob("*.json"))]
    return {
        "name": workdir.resolve().name,
        "datasets": [recipe.config.data.source],
        "training": {**training, "steps": step, "batch size": fields.batch_size, "seed": fields.seed},
        "metrics": _read_whole(workdir / RESULTS, _rounded),
        "samples": next((path for name in _SAMPLES if (path := workdir / "figures" / name).exists()), None),
        "evaluations": list(filter(None, evaluations)),
    }


def _rounded(results: Any) -> dict[str, float]:
    return {str(name): float(np.round(float(value), 4)) for name, value in results.items()}


def _evaluation(content: Any) -> dict[str, Any]:
    """Returns an evaluation that launch.evaluate wrote, after checking its fields."""
    if not (isinstance(content["protocol"], dict) and isinstance(content["results"], dict)):
        raise TypeError("no protocol and results")
    return content


def _read_whole(path: epath.Path, read: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """Returns `read` of a JSON file's content; {} if there is no file or, with a warning, if it is damaged."""
    if not path.exists():
        return {}
    try:
        return read(json.loads(path.read_bytes()))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OSError) as error:
        logger.warning("%s is damaged, and its figures are left out: %s", path, one_line(error))
        return {}
