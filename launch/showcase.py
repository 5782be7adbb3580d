"""The pictures that a finished training leaves."""

from collections.abc import Sequence

import jax
import numpy as np
from etils import epath

from launch.common import example_labels
from tarflow_jax.figures import class_names, class_rows, grid, save_png, to_uint8
from tarflow_jax.pipeline import TarFlowPipeline
from tarflow_jax.sampling import Guidance


def showcase(
    pipe: TarFlowPipeline,
    folder: epath.Path,
    guidance: Guidance,
    *,
    denoise_multiplier: float,
    names: Sequence[str] = (),
    num_images: int = 100,
) -> list[epath.Path]:
    """Draws the same latents raw, denoised, guided and denoised, and on their way; returns the PNGs' paths.

    `names` are the classes'. Every process draws, the first one writes.
    """
    latents = pipe.latents(jax.random.key(0), num_images)
    labels = example_labels(pipe.config.num_classes, num_images)
    level = pipe.drawn_level
    raw, trajectory = pipe.decode(latents, labels, return_trajectory=True, noise_std=level)
    sheets = {"samples_raw": class_rows(to_uint8(raw), labels, names)}
    guided = pipe.decode(latents, labels, guidance, noise_std=level)
    if pipe.noise_std is not None:
        denoised = pipe.denoise_drawn(raw, labels, denoise_multiplier)
        sheets["samples_denoised"] = class_rows(to_uint8(denoised), labels, names)
        guided = pipe.denoise_drawn(guided, labels, denoise_multiplier)
    sheets["samples_guided"] = class_rows(to_uint8(guided), labels, names)
    steps = np.asarray(trajectory[:, :8])  # [F + 1, 8, H, W, K]: a column an image, down from its latents
    captions = class_names(labels[: steps.shape[1]], names) if labels is not None else ()
    sheets["trajectory"] = grid(to_uint8(steps.reshape(-1, *steps.shape[2:])), steps.shape[1], captions=captions)
    paths = []
    for name, sheet in sheets.items():
        paths.append(folder / f"{name}.png")
        if jax.process_index() == 0:
            save_png(paths[-1], sheet)
    return paths
