"""What launch.demo computes, without its pages: samples, arrays of uploads, facts about a model."""

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from etils import epath

from launch.cli import example_labels
from tarflow_jax.arguments import PIXEL_WARN_LIMIT
from tarflow_jax.data.images import decode_image, preprocess, read_file
from tarflow_jax.evaluation.generation import quantise
from tarflow_jax.fingerprint import fingerprint
from tarflow_jax.pipeline import TarFlowPipeline
from tarflow_jax.sampling import Guidance

MAX_UPLOAD_PIXELS = 25_000_000
IN_TURN, NO_CLASS = -2, -1  # choices of a class besides the classes


class Drawn(NamedTuple):
    """Images and the frames that lead to them."""

    labels: np.ndarray  # int32 [N], -1 for no class
    frames: dict[str, np.ndarray]  # by title, uint8 [N, H, W, K]: latents, after each inverted block, and denoised
    num_bad: int  # images with pixels that are not finite or far outside [-1, 1]

    @property
    def images(self) -> np.ndarray:
        return list(self.frames.values())[-1]


def draw(
    pipe: TarFlowPipeline,
    count: int,
    label: int = IN_TURN,
    guidance: float = 0.0,
    attention_temperature: float = 1.0,
    temperature: float = 1.0,
    denoise: bool = True,
    seed: int | None = 0,
) -> Drawn:
    """Draws images with guidance weight w; denoising, or guidance at all, compiles once, and other numbers nothing.

    `attention_temperature` is of the unguided pass, `temperature` the standard deviation τ of the latents. A `seed` of
    None, an empty field, is 0.
    """
    labels = np.full(count, NO_CLASS if label == IN_TURN else label, np.int32)
    if label == IN_TURN and pipe.config.num_classes:
        labels = example_labels(pipe.config.num_classes, count)
    guided = Guidance(guidance, attention_temperature=attention_temperature)
    latents = temperature * pipe.latents(jax.random.key(seed or 0), count)
    trace = pipe.decode_trace(latents, labels, guided, noise_std=pipe.sampling_noise_std)
    blocks, trajectory = pipe.config.num_blocks, np.asarray(trace.trajectory)
    frames = {"latents": trajectory[:, 0]}
    frames |= {f"{k} of {blocks} blocks inverted": trajectory[:, k] for k in range(1, blocks + 1)}
    if denoise and pipe.noise_std is not None:
        frames["denoised"] = np.asarray(pipe.denoise_samples(trace.images, labels))
    *_, last = frames.values()
    bad = quantise(last)[1] | (np.abs(np.nan_to_num(last)) > PIXEL_WARN_LIMIT).any((1, 2, 3))
    return Drawn(labels, {title: quantise(frame)[0] for title, frame in frames.items()}, int(bad.sum()))


def read_upload(pipe: TarFlowPipeline, path: epath.PathLike) -> np.ndarray:
    """Reads an untrusted file as an 8-bit image [H, W, K] of the model's shape; raises UserError if it is none."""
    image = decode_image(read_file(Path(path)), pipe.config.image_channels, MAX_UPLOAD_PIXELS)
    return preprocess(image, "tarflow", pipe.config.image_size)


def class_names(pipe: TarFlowPipeline) -> list[str]:
    """Returns distinct names of the classes, which are numbers where the data set has no names."""
    names = list(pipe.label_names) or [str(label) for label in range(pipe.config.num_classes)]
    if len(set(names)) < len(names):  # ImageNet's crane is a bird, and a machine
        names = [f"{name} ({label})" for label, name in enumerate(names)]
    return names


def facts(pipe: TarFlowPipeline) -> dict[str, str]:
    """Returns the facts at the top of the page: the model's shape and noise, and a run's metrics."""
    return {
        "images": " × ".join(map(str, pipe.config.image_shape)),
        "classes": str(pipe.config.num_classes or "none"),
        "flow": pipe.config.summary,
        "parameters": f"{sum(leaf.size for leaf in jax.tree.leaves(pipe.variables['params'])):,}",
        "training noise": str(pipe.noise or "unknown"),
        **{name: f"{value:g}" for name, value in pipe.card.get("metrics", {}).items()},
    }


def calibration(pipe: TarFlowPipeline) -> float | None:
    """Returns the class posterior's temperature from the evaluation of these weights with the fewest draws, if any."""
    found = [each for each in pipe.card.get("evaluations", ()) if "classification" in each["results"]]
    weights = fingerprint(pipe.variables) if found else None
    figures = [each["results"]["classification"] for each in found if each["protocol"].get("fingerprint") == weights]
    return min(figures, key=lambda figure: figure["draws"])["temperature"] if figures else None
