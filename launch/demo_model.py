"""What launch.demo computes, without its page: samples, arrays of uploads, facts about a model."""

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from etils import epath

from launch.cli import DECODERS, example_labels
from tarflow_jax.arguments import PIXEL_WARN_LIMIT
from tarflow_jax.data.images import decode_image, preprocess, read_file
from tarflow_jax.errors import UserError
from tarflow_jax.evaluation.generation import quantise
from tarflow_jax.fingerprint import fingerprint
from tarflow_jax.inspection import Progress
from tarflow_jax.pipeline import TarFlowPipeline
from tarflow_jax.sampling import Guidance
from tarflow_jax.training.recipe import Recipe

MAX_UPLOAD_PIXELS = 25_000_000
IN_TURN, NO_CLASS = -2, -1  # choices of a class besides the classes
SEED_LIMIT = 2**31 - 1


class Drawn(NamedTuple):
    """Images and the frames that lead to them."""

    labels: np.ndarray  # int32 [N], -1 for no class
    frames: dict[str, np.ndarray]  # by title, uint8 [N, H, W, K]: latents, after each inverted block, and denoised
    num_bad: int  # images with pixels that are not finite or far outside [-1, 1]

    @property
    def images(self) -> np.ndarray:
        return list(self.frames.values())[-1]


class DemoModel:
    """A pipeline and what the page shows about it.

    Attributes:
      num_images: N of every draw, so that each program is compiled once.
      class_names: numbers where the data set has no names.
      choices: names and labels of the classes, and of no class.
      temperature: calibrates the class posterior; None if `launch.evaluate` did not measure it.
    """

    def __init__(self, pipe: TarFlowPipeline, folder: str, num_images: int) -> None:
        """Takes a pipeline and the workdir, saved model's folder, or hub name that it was opened from."""
        if pipe.config.image_channels not in (1, 3):
            raise UserError(f"the demo shows images of 1 or 3 channels, this model's have {pipe.config.image_channels}")
        path = epath.Path(folder)
        self.pipe, self.name, self.num_images = pipe, path.resolve().name, num_images
        self.class_names = list(pipe.label_names) or [str(label) for label in range(pipe.config.num_classes)]
        if len(set(self.class_names)) < len(self.class_names):  # ImageNet's crane is a bird, and a machine
            self.class_names = [f"{name} ({label})" for label, name in enumerate(self.class_names)]
        self.choices = [("no class", NO_CLASS), *((name, label) for label, name in enumerate(self.class_names))]
        self.decoders = {"Sequential": DECODERS["sequential"], "Jacobi": DECODERS["jacobi"]}
        self.temperature = _calibration(pipe)
        in_workdir = (path / "checkpoints").is_dir()
        preprocessing = Recipe.from_workdir(path).config.data.preprocessing if in_workdir else "none"
        self._preprocessing = "tarflow" if preprocessing == "none" else preprocessing  # uploads have any size

    def read_upload(self, path: epath.PathLike) -> np.ndarray:
        """Reads an untrusted file as an 8-bit image [H, W, K] of the model's shape; raises UserError if it is none."""
        config = self.pipe.config
        image = decode_image(read_file(Path(path)), config.image_channels, MAX_UPLOAD_PIXELS)
        return preprocess(image, self._preprocessing, config.image_size)

    def draw(
        self,
        label: int = IN_TURN,
        guidance: float = 0.0,
        attention_temperature: float = 1.0,
        temperature: float = 1.0,
        seed: int = 0,
        decoder: str = "Sequential",
        denoise: bool = True,
        progress: Progress = lambda share, what: None,
    ) -> Drawn:
        """Draws N images; raises UserError for settings that the model does not support.

        Other numbers compile nothing; another decoder, denoising, or guidance at all does so once.

        Args:
          guidance: weight w.
          attention_temperature: of the unguided pass.
          temperature: standard deviation τ of the latents.
          decoder: a key of `decoders`.
        """
        pipe, count = self.pipe, self.num_images
        if not 0 <= seed <= SEED_LIMIT:
            raise UserError(f"the seed is {seed}; expected a whole number from 0 to {SEED_LIMIT}")
        labels = np.full(count, label, np.int32)
        if label == IN_TURN:
            labels = example_labels(len(self.class_names), count)
        guided = Guidance(guidance, attention_temperature=attention_temperature)
        latents = temperature * pipe.latents(jax.random.key(seed), count)
        blocks = pipe.config.num_blocks
        progress(0.1, f"inverting {blocks} blocks for {count} images")
        trace = pipe.decode_trace(latents, labels, guided, self.decoders[decoder], pipe.sampling_noise_std)
        frames = list(np.moveaxis(np.asarray(trace.trajectory), 1, 0))
        titles = ["latents", *(f"{k} of {blocks} blocks inverted" for k in range(1, blocks + 1))]
        if denoise and pipe.noise_std is not None:
            progress(0.7, "denoising")
            frames.append(np.asarray(pipe.denoise_samples(trace.images, labels)))
            titles.append("denoised")
        pictures, bad = zip(*map(quantise, frames), strict=True)
        far = (np.abs(np.nan_to_num(frames[-1])) > PIXEL_WARN_LIMIT).any((1, 2, 3))
        shown = np.full(count, NO_CLASS, np.int32) if labels is None else labels
        return Drawn(shown, dict(zip(titles, pictures, strict=True)), int((bad[-1] | far).sum()))

    def facts(self) -> dict[str, str]:
        """Returns the facts at the top of the page: the model's shape, training and metrics."""
        pipe, card = self.pipe, self.pipe.card
        config, training = pipe.config, card.get("training", {})
        height, width, channels = config.image_shape
        parameters = sum(leaf.size for leaf in jax.tree.leaves(pipe.variables["params"]))
        return {
            **({"data": ", ".join(card["datasets"])} if "datasets" in card else {}),
            "images": f"{height} × {width} × {channels}",
            "classes": str(config.num_classes or "none"),
            "flow": config.summary,
            "parameters": f"{parameters:,}",
            "training noise": "unknown" if pipe.noise is None else str(pipe.noise),
            **({"steps": f"{training['steps']:,}"} if "steps" in training else {}),
            **{name: f"{value:g}" for name, value in card.get("metrics", {}).items()},
        }


def _calibration(pipe: TarFlowPipeline) -> float | None:
    """Returns the posterior's temperature from the evaluation of these weights with the fewest draws, if any."""
    found = [each for each in pipe.card.get("evaluations", ()) if "classification" in each["results"]]
    weights = fingerprint(pipe.variables) if found else None
    figures = [each["results"]["classification"] for each in found if each["protocol"].get("fingerprint") == weights]
    return min(figures, key=lambda figure: figure["draws"])["temperature"] if figures else None
