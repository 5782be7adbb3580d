"""What the demo computes, without its page: samples, arrays of uploads, facts about a model."""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from launch import cli
from tarflow_jax.data.images import decode_image, preprocess, read_file
from tarflow_jax.errors import UserError
from tarflow_jax.evaluation.generation import quantise
from tarflow_jax.fingerprint import fingerprint
from tarflow_jax.inspection import Progress
from tarflow_jax.pipeline import FAR_OUTSIDE, TarFlowPipeline
from tarflow_jax.sampling import Guidance
from tarflow_jax.training.recipe import Recipe, label_names

MAX_UPLOAD_PIXELS = 25_000_000
IN_TURN, NO_CLASS = -2, -1  # choices of a class besides the classes
SEED_LIMIT = 2**31 - 1
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a draw. Numbers compile nothing; another decoder, denoising, or guidance at all does so once."""

    label: int = IN_TURN
    guidance: float = 0.0  # weight w
    attention_temperature: float = 1.0  # of the unguided pass
    temperature: float = 1.0  # standard deviation τ of the latents
    seed: int = 0
    decoder: str = "Sequential"
    denoise: bool = True


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Images and the frames that lead to them, uint8."""

    labels: np.ndarray  # int32 [N], -1 for no class
    frames: tuple[np.ndarray, ...]  # [N, H, W, K]: latents, after 1, … F inverted blocks, and denoised if asked for
    num_bad: int  # images with pixels that are not finite or far outside [-1, 1]

    @property
    def images(self) -> np.ndarray:
        return self.frames[-1]


@dataclasses.dataclass(frozen=True)
class DemoModel:
    """A model and what is known about it."""

    pipe: TarFlowPipeline
    name: str  # of its folder
    num_images: int  # N of every draw, so that each program is compiled once
    class_names: tuple[str, ...]  # numbers where the data set has no names
    decoders: Mapping[str, Any]  # by name
    preprocessing: str  # of uploads, see `data.images.preprocess`
    temperature: float | None  # calibrates the class posterior; None if `launch.evaluate` did not measure it

    @classmethod
    def of(cls, pipe: TarFlowPipeline, folder: str, num_images: int) -> "DemoModel":
        """Makes one from a pipeline and the workdir, saved model's folder, or hub name that it was opened from."""
        if pipe.config.image_channels not in (1, 3):
            raise UserError(f"the demo shows images of 1 or 3 channels, this model's have {pipe.config.image_channels}")
        path = epath.Path(folder)
        in_workdir = (path / "checkpoints").is_dir()
        preprocessing = Recipe.from_workdir(path).config.data.preprocessing if in_workdir else "none"
        names = label_names(path) or [str(label) for label in range(pipe.config.num_classes)]
        if len(set(names)) < len(names):  # ImageNet's crane is a bird, and a machine
            names = [f"{name} ({label})" for label, name in enumerate(names)]
        decoders = {"Sequential": cli.DECODERS["sequential"], "Jacobi": cli.DECODERS["jacobi"]}
        if _has_schedule(pipe):
            decoders["Tuned"] = cli.DECODERS["auto"]
        return cls(
            pipe,
            path.resolve().name,
            num_images,
            tuple(names),
            decoders,
            "tarflow" if preprocessing == "none" else preprocessing,  # uploads have any size
            _calibration(pipe),
        )

    @property
    def choices(self) -> list[tuple[str, int]]:
        """Names and labels of the classes."""
        return [("no class", NO_CLASS), *((name, label) for label, name in enumerate(self.class_names))]

    def read_upload(self, path: epath.PathLike) -> np.ndarray:
        """Reads an untrusted file as an 8-bit image [H, W, K] of the model's shape; raises UserError if it is none."""
        config = self.pipe.config
        image = decode_image(read_file(Path(path)), config.image_channels, MAX_UPLOAD_PIXELS)
        return preprocess(image, self.preprocessing, config.image_size)

    def draw(self, settings: Settings, progress: Progress = lambda share, what: None) -> Drawn:
        """Draws N images; raises UserError for settings that the model does not support."""
        pipe, count = self.pipe, self.num_images
        if not 0 <= settings.seed <= SEED_LIMIT:
            raise UserError(f"the seed is {settings.seed}; expected a whole number from 0 to {SEED_LIMIT}")
        labels = np.full(count, settings.label, np.int32)
        if settings.label == IN_TURN:
            labels = cli.example_labels(len(self.class_names), count)
        guidance = Guidance(settings.guidance, attention_temperature=settings.attention_temperature)
        latents = settings.temperature * pipe.latents(jax.random.key(int(settings.seed)), count)
        progress(0.1, f"inverting {pipe.config.num_blocks} blocks for {count} images")
        decoder = self.decoders[settings.decoder]
        images, _, trajectory, *_ = pipe.decode_trace(latents, labels, guidance, decoder, pipe.drawn_level)
        frames = [*np.moveaxis(np.asarray(trajectory), 1, 0)]
        if settings.denoise and pipe.noise_std is not None:
            progress(0.7, "denoising")
            frames.append(np.asarray(pipe.denoise_drawn(images, labels)))
        pictures, bad = zip(*map(quantise, frames), strict=True)
        far = (np.abs(np.nan_to_num(frames[-1])) > FAR_OUTSIDE).any((1, 2, 3))
        shown = np.full(count, NO_CLASS, np.int32) if labels is None else labels
        return Drawn(shown, pictures, int((bad[-1] | far).sum()))

    def frame_titles(self, drawn: Drawn) -> list[str]:
        """The title of each of `drawn.frames`."""
        blocks = self.pipe.config.num_blocks
        titles = ["latents", *(f"{k} of {blocks} blocks inverted" for k in range(1, blocks + 1)), "denoised"]
        return titles[: len(drawn.frames)]

    def facts(self) -> dict[str, str]:
        """The facts at the top of the page: the model's shape, its training, its metrics."""
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


def _has_schedule(pipe: TarFlowPipeline) -> bool:
    try:
        return pipe.schedule is not None
    except UserError as error:
        logger.warning("the tuned decoder is left out: %s", error)
        return False


def _calibration(pipe: TarFlowPipeline) -> float | None:
    """The posterior's temperature, if the workdir has an evaluation of these weights; of several, the fewest draws'."""
    found = [each for each in pipe.card.get("evaluations", ()) if "classification" in each["results"]]
    weights = fingerprint(pipe.variables) if found else None
    figures = [each["results"]["classification"] for each in found if each["protocol"].get("fingerprint") == weights]
    return min(figures, key=lambda figure: figure["draws"])["temperature"] if figures else None
