"""Trains the autoencoder whose latents a flow models; to continue a run, run the same command again.

python -m launch.train_autoencoder --config=configs/emoji64_autoencoder.py --workdir=runs/emoji64_autoencoder

The result is in WORKDIR/autoencoder, in diffusers' format, for launch.prepare_data --autoencoder=WORKDIR/autoencoder.
With --config.decoder_of=FOLDER the encoder is that folder's and does not change, and the decoder starts from there.
"""

import dataclasses
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
from tarflow_jax.data import data_folder
from tarflow_jax.errors import UserError
from tarflow_jax.evaluation.classifier import perceptual_network_params
from tarflow_jax.figures import grid, save_png, to_uint8
from tarflow_jax.noise import to_float
from tarflow_jax.runtime import PreemptionGuard, use_cores_as_devices
from tarflow_jax.training import Recipe, train
from tarflow_jax.training.loop import evaluate_loss
from tarflow_jax.training.task import ENCODER, Frozen
from tarflow_jax.training.workdir import write_results

CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe: configs/emoji64_autoencoder.py, or its ….py:smoke.")
WORKDIR = flags.DEFINE_string("workdir", None, "Run directory, local or gs://; created if it does not exist.")
SHOWN, SCALED_BY = 8, 1024  # test images in the figure; training images that decide the scale of the latents
cli.define_process_flags()


def main(argv: Sequence[str]) -> None:
    """Trains, writes the autoencoder and prints a table."""
    begin = time.perf_counter()
    config, workdir = CONFIG.value, epath.Path(cli.folder("workdir"))
    cli.join_processes()
    if "autoencoder" not in config:
        raise UserError("--config is no autoencoder's recipe; expected one such as configs/emoji64_autoencoder.py")
    if config.mesh.data == -1:  # before anything asks for devices
        use_cores_as_devices(config.train.batch_size // config.train.accumulation)
    encoder, initial = None, None
    if config.decoder_of:
        start = Autoencoder.from_pretrained(config.decoder_of)
        fixed = {"noise_std": config.autoencoder.noise_std, "dtype": config.autoencoder.dtype}
        config.autoencoder.update(dataclasses.replace(start.config, **fixed).to_dict())
        encoder = {name: leaves for name, leaves in start.params.items() if name in ENCODER}
        decoder = {name: leaves for name, leaves in start.params.items() if name not in ENCODER}
        initial = {"params": {"autoencoder": decoder}}
    recipe = Recipe(config)
    test, perception = recipe.source("test"), None
    if config.reconstruction.perceptual:
        folder, steps = data_folder(config.data.data_dir) / "evaluation", config.reconstruction.perceptual_steps
        perception = perceptual_network_params(recipe.source("train"), folder, steps)
    frozen = Frozen(perception=perception, encoder=encoder)

    def trained(variables: dict[str, Any]) -> Autoencoder:
        params = (encoder or {}) | variables["params"]["autoencoder"]
        return Autoencoder(recipe.autoencoder, jax.device_get(params))

    images = to_float(test.read(np.arange(min(SHOWN, len(test))))[0])

    def preview(step: int, variables: dict[str, Any]) -> None:
        model = trained(variables)
        sheet = to_uint8(np.concatenate([images, model.decode(model.encode(images))]))
        if jax.process_index() == 0:
            save_png(workdir / "figures" / f"step_{step:07d}.png", grid(sheet, SHOWN))

    state = train(config, workdir, preview, frozen, initial)
    with PreemptionGuard():
        error = evaluate_loss(recipe, state.sampling_variables, frozen)
        model = trained(state.sampling_variables)
        if not config.decoder_of:
            model = scaled(model, recipe)
        preview(int(state.step), state.sampling_variables)
    if jax.process_index():
        return
    model.save_pretrained(workdir / "autoencoder")
    psnr = float(10 * np.log10(4 / error))
    write_results(workdir, {"PSNR of test images (dB)": psnr})
    rows = {
        "steps": int(state.step),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(model.params)),
        "PSNR of test images": f"{psnr:.2f} dB",
        "noise of the decoder": f"{model.config.noise_std:.3f} of the latents' standard deviation",
        "minutes": f"{(time.perf_counter() - begin) / 60:.1f}",
        "autoencoder": workdir / "autoencoder",
    }
    print("\n".join(f"{name:<22} {value}" for name, value in rows.items()))


def scaled(model: Autoencoder, recipe: Recipe) -> Autoencoder:
    """The autoencoder with the scale at which its latents of training images have mean 0 and standard deviation 1.

    A constant deviation of z is what the decoder has learned to remove.
    """
    source = recipe.source("train")
    index = np.linspace(0, len(source) - 1, min(SCALED_BY, len(source))).astype(int)
    config = dataclasses.replace(model.config, scaling_factor=1.0, shift_factor=0.0)
    z = np.asarray(Autoencoder(config, model.params).encode(to_float(source.read(index)[0])), np.float64)
    factor = float(1 / z.std())
    fields = {"scaling_factor": factor, "shift_factor": float(z.mean()), "noise_std": factor * config.latent_std}
    return Autoencoder(dataclasses.replace(config, **fields), model.params)


if __name__ == "__main__":
    cli.run(main, "config", "workdir")
