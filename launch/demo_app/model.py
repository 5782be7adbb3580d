"""What the demo computes, without its page: samples, uploads to arrays, what is known of a model."""

import dataclasses
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from launch import common
from tarflow_jax.data.images import decode_image, preprocess, read_file
from tarflow_jax.errors import UserError, one_line
from tarflow_jax.evaluation.generation import quantise
from tarflow_jax.fingerprint import fingerprint
from tarflow_jax.inspection import Progress
from tarflow_jax.pipeline import FAR_OUTSIDE, TarFlowPipeline
from tarflow_jax.sampling import Decoder, Guidance, Jacobi, Sequential
from tarflow_jax.training.recipe import Recipe, label_names

MAX_UPLOAD_PIXELS = 25_000_000
IN_TURN, NO_CLASS = -2, -1  # choices of a class beside the classes
SEED_LIMIT = 2**31 - 1
DECODERS: Mapping[str, Decoder | str] = {"Sequential": Sequential(), "Jacobi": Jacobi()}
TUNED = "Tuned"
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of a draw. Moving any number compiles nothing; another decoder, denoising, or guidance at all does, once."""

    label: int = IN_TURN
    guidance: float = 0.0  # weight w
    attention_temperature: float = 1.0  # of the unguided pass
    temperature: float = 1.0  # standard deviation τ of the latents
    seed: int = 0
    decoder: str = "Sequential"
    denoise: bool = True


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Images and how they came to be, uint8."""

    labels: np.ndarray  # int32 [N], -1 for no class
    frames: tuple[np.ndarray, ...]  # [N, H, W, K]: latents, after 1, … F inverted blocks, and denoised if asked for
    num_bad: int  # images with pixels that are no numbers or far outside [-1, 1]

    @property
    def images(self) -> np.ndarray:
        return self.frames[-1]


@dataclasses.dataclass(frozen=True)
class DemoModel:
    """A model and what is known of it.

    Attributes:
      name: of its folder. num_images: N, of every draw, so that each program is compiled once.
      class_names: C names; numbers where the data set has none.
      decoders: by name, what its blocks can be inverted by.
      preprocessing: of uploads, see `data.images.preprocess`.
      temperature: what calibrates the posterior of the classes; None where `launch.evaluate` did not measure it.
    """

    pipe: TarFlowPipeline
    name: str
    num_images: int
    class_names: tuple[str, ...]
    decoders: Mapping[str, Any]
    preprocessing: str
    temperature: float | None

    @classmethod
    def of(cls, pipe: TarFlowPipeline, folder: str, num_images: int) -> "DemoModel":
        """Of a pipeline, and the workdir, saved model's folder, or hub name that it comes from."""
        if pipe.config.image_channels not in (1, 3):
            raise UserError(f"the demo shows images of 1 or 3 channels, this model's have {pipe.config.image_channels}")
        path = epath.Path(folder)
        given = Recipe.from_workdir(path).config.data.preprocessing if (path / "checkpoints").is_dir() else "none"
        names = label_names(path) or [str(label) for label in range(pipe.config.num_classes)]
        if len(set(names)) < len(names):  # ImageNet's crane is a bird, and a machine
            names = [f"{name} ({label})" for label, name in enumerate(names)]
        return cls(
            pipe,
            path.resolve().name,
            num_images,
            tuple(names),
            DECODERS | ({TUNED: "auto"} if _has_schedule(pipe) else {}),
            "tarflow" if given == "none" else given,  # uploads are of any size
            _calibration(path, pipe),
        )

    @property
    def choices(self) -> list[tuple[str, int]]:
        """Names and labels of the classes."""
        return [("no class", NO_CLASS), *((name, label) for label, name in enumerate(self.class_names))]

    def read_upload(self, path: epath.PathLike) -> np.ndarray:
        """A stranger's file as an 8-bit image of the model's [H, W, K]; ValueError in one line where it is none."""
        config = self.pipe.config
        image = decode_image(read_file(Path(path)), config.image_channels, MAX_UPLOAD_PIXELS)
        return preprocess(image, self.preprocessing, config.image_size)

    def draw(self, settings: Settings, progress: Progress = lambda share, what: None) -> Drawn:
        """N images; raises ValueError for settings that the model cannot have."""
        pipe, count = self.pipe, self.num_images
        if not 0 <= settings.seed <= SEED_LIMIT:
            raise UserError(f"the seed is {settings.seed}; expected a whole number from 0 to {SEED_LIMIT}")
        labels = np.full(count, settings.label, np.int32)
        if settings.label == IN_TURN:
            labels = common.example_labels(len(self.class_names), count)
        guidance = Guidance(settings.guidance, attention_temperature=settings.attention_temperature)
        latents = settings.temperature * pipe.latents(jax.random.key(int(settings.seed)), count)
        progress(0.1, f"inverting {pipe.config.num_blocks} blocks for {count} images")
        images, trajectory = pipe.decode(
            latents,
            labels,
            guidance,
            return_trajectory=True,
            decoder=self.decoders[settings.decoder],
            noise_std=pipe.drawn_level,
        )
        frames = [*np.asarray(trajectory)]
        if settings.denoise and pipe.noise_std is not None:
            progress(0.7, "denoising")
            frames.append(np.asarray(pipe.denoise_drawn(images, labels)))
        pictures, bad = zip(*map(quantise, frames), strict=True)
        far = (np.abs(np.nan_to_num(frames[-1])) > FAR_OUTSIDE).any((1, 2, 3))
        shown = np.full(count, NO_CLASS, np.int32) if labels is None else labels
        return Drawn(shown, pictures, int((bad[-1] | far).sum()))

    def frame_titles(self, drawn: Drawn) -> list[str]:
        """What each of `frames` is."""
        blocks = self.pipe.config.num_blocks
        titles = ["latents", *(f"{k} of {blocks} blocks inverted" for k in range(1, blocks + 1)), "denoised"]
        return titles[: len(drawn.frames)]

    def facts(self) -> dict[str, str]:
        """What a page's head says of the model: its shape, its training, its measured figures."""
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


def _calibration(folder: epath.Path, pipe: TarFlowPipeline) -> float | None:
    """The posterior's temperature, as the last evaluation of these weights found it."""
    reports = [*(folder / "evaluation").glob("*classification*.json")]
    weights = fingerprint(pipe.variables) if reports else None
    for path in sorted(reports, key=lambda path: path.stat().mtime, reverse=True):
        try:
            report = json.loads(path.read_text())
            temperature = float(report["results"]["classification"]["temperature"])
            if report["protocol"]["fingerprint"] == weights and 0 < temperature < math.inf:
                return temperature
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("%s is no evaluation, and is left out: %s", path, one_line(error))
    return None
