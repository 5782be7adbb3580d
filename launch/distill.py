"""Trains a student of a flow: a second network that maps latents to a clean image in one pass.

python -m launch.distill --workdir=runs/digits --config=configs/student/digits.py [--config.train.num_steps=…]

It trains on the flow's data and keeps the student in the workdir's folder student/. To continue, run the same command
again; then draw with launch.sample --decoder=student.
"""

import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath
from ml_collections import config_flags

from configs.defaults import with_flow
from launch import cli
from tarflow_jax.data import data_folder
from tarflow_jax.errors import UserError
from tarflow_jax.evaluation.classifier import perceptual_network_params
from tarflow_jax.figures import grid, save_png, to_uint8
from tarflow_jax.fingerprint import fingerprint
from tarflow_jax.pipeline import TarFlowPipeline
from tarflow_jax.runtime import PreemptionGuard, use_cores_as_devices
from tarflow_jax.sampling import Student
from tarflow_jax.student import TrainedStudent
from tarflow_jax.training import Frozen, Recipe, train
from tarflow_jax.training.loop import evaluate_loss
from tarflow_jax.training.recipe import same_data
from tarflow_jax.training.workdir import STUDENT, write_results

CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe: configs/student/digits.py, or its ….py:smoke.")
WORKDIR = flags.DEFINE_string("workdir", None, "Run directory of the flow; the student is saved in its student/.")
COLUMNS, POLISH = 10, 2  # of the figures
CHECKPOINT = flags.DEFINE_enum("checkpoint", "last", ["last", "best"], "Checkpoint of the flow; best: lowest loss.")
cli.define_process_flags()


def main(argv: Sequence[str]) -> None:
    """Trains, and prints a table."""
    begin = time.perf_counter()
    workdir = epath.Path(cli.folder("workdir"))
    folder = workdir / STUDENT
    cli.join_processes()
    config = with_flow(CONFIG.value, Recipe.from_workdir(workdir).config)
    if config.mesh.data == -1:
        use_cores_as_devices(config.train.batch_size // config.train.accumulation)
    recipe = Recipe(config)
    pipe = TarFlowPipeline.from_pretrained(workdir, best=CHECKPOINT.value == "best", mesh=recipe.mesh())
    config.student.flow = fingerprint(pipe.variables)
    if (folder / "config.json").exists() and Recipe.from_workdir(folder).config.student.flow != config.student.flow:
        raise UserError(f"{folder} holds a student of other weights of the flow; remove it to train another")
    recipe.source("test")  # reject before training what would be rejected after it
    if not same_data(workdir, recipe.source("train")):
        raise UserError(f"{config.data.source} is not what {workdir} was trained on; bring its images and labels back")
    perception = None
    if recipe.student.perceptual:
        perception = perceptual_network_params(recipe.source("train"), data_folder(config.data.data_dir) / "evaluation")

    def preview(step: int, variables: dict[str, Any]) -> None:
        student = TrainedStudent(recipe.student, variables, config.student.flow)
        sheet = compare(TarFlowPipeline(pipe.config, pipe.variables, pipe.noise, student=student, mesh=recipe.mesh()))
        if jax.process_index() == 0:
            save_png(folder / "figures" / f"step_{step:07d}.png", sheet)

    teacher = Frozen(pipe.variables, perception)
    state = train(config, folder, preview, teacher)
    with PreemptionGuard():
        error = evaluate_loss(recipe, state.sampling_variables, teacher)
        preview(int(state.step), state.sampling_variables)
    if jax.process_index():
        return
    write_results(folder, {"mean square error of clean test images": error})
    counts = [sum(leaf.size for leaf in jax.tree.leaves(v["params"])) for v in (state.variables, pipe.variables)]
    rows = {
        "steps": int(state.step),
        "parameters": f"{counts[0]}, {counts[0] / counts[1]:.2f} times the flow's",
        "test error": f"{error:.4f}",
        "minutes": f"{(time.perf_counter() - begin) / 60:.1f}",
        "metrics": folder / "metrics.jsonl",
        "figures": folder / "figures",
    }
    print("\n".join(f"{name:<22} {value}" for name, value in rows.items()))


def compare(pipe: TarFlowPipeline) -> np.ndarray:
    """Decodes the same latents exactly, by the student and polished, one row each, denoised; uint8."""
    latents, labels = pipe.latents(jax.random.key(0), COLUMNS), cli.example_labels(pipe.config.num_classes, COLUMNS)
    rows = {}
    for name, decoder in (("exact", None), ("student", Student()), (f"polished by {POLISH}", Student(POLISH))):
        images = pipe.decode(latents, labels, decoder=decoder, noise_std=pipe.sampling_noise_std)
        if decoder != Student() and pipe.noise_std is not None:
            images = pipe.denoise_samples(images, labels)
        rows[name] = to_uint8(images)
    return grid(np.concatenate(list(rows.values())), COLUMNS, list(rows))


if __name__ == "__main__":
    cli.run(main, "config", "workdir")
