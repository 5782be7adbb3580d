"""Opens the checkpoints in a run's workdir as models, and records the run's starts and results."""

import contextlib
import datetime
import json
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from tarflow_jax.errors import UserError
from tarflow_jax.files import write_text
from tarflow_jax.interop import SavedModel
from tarflow_jax.runtime import environment, make_mesh
from tarflow_jax.student import TrainedStudent
from tarflow_jax.training.checkpoint import Checkpoints
from tarflow_jax.training.recipe import Recipe, label_names, read_json
from tarflow_jax.training.step import abstract_state

RESULTS, STUDENT, STARTS = "results.json", "student", "starts.jsonl"
_SAMPLES = ("samples_guided.png", "samples_denoised.png", "samples_raw.png")  # the card shows the first that exists


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
        checkpoint = checkpoints.restore(wanted, best=best, partial=True)
    if checkpoint is None:
        raise FileNotFoundError(f"{workdir} holds no checkpoint yet; train until train.checkpoint_every first")
    return checkpoint


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
    options, names = recipe.config.train, label_names(workdir)
    training = {"classes": ", ".join(names)} if names else {}
    evaluations = map(read_json, sorted((workdir / "evaluation").glob("*.json")))
    return {
        "name": workdir.resolve().name,
        "datasets": [recipe.config.data.source],
        "training": {**training, "steps": step, "batch size": options.batch_size, "seed": options.seed},
        "metrics": {name: round(value, 4) for name, value in read_json(workdir / RESULTS).items()},
        "samples": next((path for name in _SAMPLES if (path := workdir / "figures" / name).exists()), None),
        "evaluations": [fields for fields in evaluations if {"protocol", "results"} <= fields.keys()],
    }
