"""The figures that training leaves in its workdir."""

from collections.abc import Sequence

import jax
import numpy as np
from etils import epath

from launch.cli import example_labels
from tarflow_jax.figures import class_names, class_rows, grid, save_png, to_uint8
from tarflow_jax.pipeline import TarFlowPipeline
from tarflow_jax.sampling import Guidance

NUM_IMAGES = 100


def showcase(
    pipe: TarFlowPipeline,
    folder: epath.Path,
    guidance: Guidance,
    *,
    denoise_multiplier: float,
    names: Sequence[str] = (),
) -> list[epath.Path]:
    """Decodes the same latents raw, denoised, guided and denoised, and block by block; returns the paths of the PNGs.

    `names` are those of the classes. Every process draws; the first one writes.
    """
    latents = pipe.latents(jax.random.key(0), NUM_IMAGES)
    labels = example_labels(pipe.config.num_classes, NUM_IMAGES)
    raw, _, trajectory, *_ = pipe.decode_trace(latents, labels, noise_std=pipe.drawn_level)
    guided = pipe.decode(latents, labels, guidance, noise_std=pipe.drawn_level)
    images = {"samples_raw": raw}
    if pipe.noise_std is not None:
        images["samples_denoised"] = pipe.denoise_drawn(raw, labels, denoise_multiplier)
        guided = pipe.denoise_drawn(guided, labels, denoise_multiplier)
    images["samples_guided"] = guided
    sheets = {name: class_rows(to_uint8(drawn), labels, names) for name, drawn in images.items()}
    steps = np.moveaxis(
        np.asarray(trajectory[:8]), 1, 0
    )  # [F + 1, 8, H, W, K]: a column for each image, its latents at the top
    captions = class_names(labels[: steps.shape[1]], names) if labels is not None else ()
    sheets["trajectory"] = grid(to_uint8(steps.reshape(-1, *steps.shape[2:])), steps.shape[1], captions=captions)
    paths = [folder / f"{name}.png" for name in sheets]
    if jax.process_index() == 0:
        for path, sheet in zip(paths, sheets.values(), strict=True):
            save_png(path, sheet)
    return paths
