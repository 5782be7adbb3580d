"""Trains a TarFlow; to continue a run, run the same command again.

python -m launch.train --config=configs/digits.py --workdir=runs/digits [--config.train.num_steps=…]

On several hosts, or as several processes: the same command with --distributed in each.
"""

import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath
from ml_collections import config_flags

from launch import cli
from tarflow_jax.autoencoder import Autoencoder
from tarflow_jax.data import LatentSource
from tarflow_jax.figures import captioned_grid, class_names, class_rows, grid, save_png, to_uint8
from tarflow_jax.likelihood import LOG_2PI
from tarflow_jax.pipeline import TarFlowPipeline
from tarflow_jax.runtime import PreemptionGuard
from tarflow_jax.sampling import Guidance
from tarflow_jax.text_to_image import TextToImage
from tarflow_jax.training import Recipe, train
from tarflow_jax.training.loop import evaluate_loss
from tarflow_jax.training.recipe import label_names
from tarflow_jax.training.workdir import write_results

PREVIEW_IMAGES, FIGURE_IMAGES, TRAJECTORIES = 64, 100, 8

CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe: configs/digits.py, or its variant, ….py:smoke.")
WORKDIR = flags.DEFINE_string("workdir", None, "Run directory, local or gs://; created if it does not exist.")
cli.define_process_flags()


def main(argv: Sequence[str]) -> None:
    """Trains, draws figures and prints a table."""
    begin = time.perf_counter()
    config, workdir = CONFIG.value, epath.Path(cli.folder("workdir"))
    cli.join_processes()
    recipe = Recipe(config)
    guidance = Guidance(**config.sample.guidance)
    guidance.checked_for(recipe.model)  # rejects before training what would be rejected after it
    autoencoder = None
    if isinstance(source := recipe.source("test"), LatentSource):
        autoencoder = Autoencoder.from_pretrained(source.folder / "autoencoder")

    def preview(step: int, variables: dict[str, Any]) -> None:
        pipe = TarFlowPipeline(recipe.model, variables, recipe.noise, mesh=recipe.mesh())
        if autoencoder:
            sheet = drawn_latents(TextToImage(pipe, autoencoder, guidance=guidance), recipe)
        else:
            labels = cli.example_labels(pipe.config.num_classes, PREVIEW_IMAGES)
            images = pipe.sample(jax.random.key(0), PREVIEW_IMAGES, labels, guidance)
            sheet = class_rows(to_uint8(images), labels, label_names(workdir))
        if jax.process_index() == 0:
            save_png(workdir / "figures" / f"step_{step:07d}.png", sheet)

    of_sequences = recipe.model.is_sequence
    state = train(recipe.config, workdir, None if of_sequences else preview)
    variables, names = state.sampling_variables, label_names(workdir)
    with PreemptionGuard():
        test_loss = evaluate_loss(recipe, variables)
        pipe = TarFlowPipeline(recipe.model, variables, recipe.noise, mesh=recipe.mesh())
        sheets = {}
        if autoencoder:
            sheets = {"samples_guided": drawn_latents(TextToImage(pipe, autoencoder, guidance=guidance), recipe)}
        elif not of_sequences:
            sheets = figures(pipe, guidance, config.sample.denoise_multiplier, names)
    if jax.process_index():
        return
    paths = {name: workdir / "figures" / f"{name}.png" for name in sheets}
    for name, sheet in sheets.items():
        save_png(paths[name], sheet)
    loss_name = "test loss (nats)" if of_sequences else "test loss (nats/dim, less ½ log 2π)"
    write_results(workdir, {loss_name: test_loss})  # last: the run is complete
    rows = {
        "steps": int(state.step),
        **({"classes": ", ".join(names[:20]) + ", …" * (len(names) > 20)} if names else {}),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
        loss_name: f"{test_loss:.4f}",
        **({} if of_sequences else {"nats/dim of noisy data": f"{test_loss + LOG_2PI / 2:.4f}"}),
        "minutes": f"{(time.perf_counter() - begin) / 60:.1f}",
        "metrics": workdir / "metrics.jsonl",
        **paths,
    }
    print("\n".join(f"{name:<22} {value}" for name, value in rows.items()))


def drawn_latents(pipe: TextToImage, recipe: Recipe) -> np.ndarray:
    """A sheet of what a flow of latents draws from packed captions, or from classes."""
    source, classes = recipe.source("test"), pipe.flow.config.num_classes
    index = np.linspace(0, len(source) - 1, PREVIEW_IMAGES).astype(int)
    (_, _, condition), labels = source.read(index)
    if condition is None:
        labels = cli.example_labels(classes, PREVIEW_IMAGES)
        return class_rows(to_uint8(pipe(None, PREVIEW_IMAGES, labels=labels)), labels, source.label_names)
    images = pipe(condition, labels=labels if classes else None)
    return captioned_grid(to_uint8(images), [source.captions[i][0] for i in index], 8)


def figures(
    pipe: TarFlowPipeline, guidance: Guidance, denoise_multiplier: float, names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Decodes the same latents raw, denoised, guided and denoised, and block by block; uint8 sheets by name."""
    latents = pipe.latents(jax.random.key(0), FIGURE_IMAGES)
    labels = cli.example_labels(pipe.config.num_classes, FIGURE_IMAGES)
    raw = pipe.decode_trace(latents, labels, noise_std=pipe.sampling_noise_std)
    images = {"samples_raw": raw.images}
    guided = pipe.decode(latents, labels, guidance, noise_std=pipe.sampling_noise_std)
    if pipe.noise_std is not None:
        images["samples_denoised"] = pipe.denoise_samples(raw.images, labels, denoise_multiplier)
        guided = pipe.denoise_samples(guided, labels, denoise_multiplier)
    images["samples_guided"] = guided
    sheets = {name: class_rows(to_uint8(drawn), labels, names) for name, drawn in images.items()}
    # A column for each image, its latents at the top.
    steps = np.moveaxis(np.asarray(raw.trajectory[:TRAJECTORIES]), 1, 0).reshape(-1, *pipe.config.image_shape)
    captions = () if labels is None else class_names(labels[:TRAJECTORIES], names)
    sheets["trajectory"] = grid(to_uint8(steps), TRAJECTORIES, captions=captions)
    return sheets


if __name__ == "__main__":
    cli.run(main, "config", "workdir")
