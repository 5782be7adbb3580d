"""Draws samples to disk in chunks, so that an interrupted run can resume, and exports them as ADM's npz files.

Chunk i depends only on the key fold_in(key(seed), i), so any process can draw it at any time.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from tarflow_jax.data import ImageSource
from tarflow_jax.errors import UserError
from tarflow_jax.figures import to_uint8
from tarflow_jax.files import read_npz, write_npz, write_text
from tarflow_jax.fingerprint import fingerprint
from tarflow_jax.pipeline import TarFlowPipeline
from tarflow_jax.runtime import progress
from tarflow_jax.sampling import DEFAULT_DENOISING, Decoder, Guidance, Student
from tarflow_jax.text_to_image import TextToImage

CHUNK, CHUNK_SIZE = "chunk_{:05d}.npz", 500  # a file's name, and the samples in it
NOT_FINITE = 128  # grey, in place of a pixel that is NaN or infinite
Counts = Sequence[int] | np.ndarray  # [C], how often samples have each class


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Draws images of a model, always with the same settings.

    Attributes:
      model: a flow of images, or one of latents with its autoencoder.
      guidance, denoise, decoder: see `TarFlowPipeline.sample`.
      denoise_multiplier: the same; latents are denoised with 1.
      captions: label i stands for caption i, if the model draws from captions.
    """

    model: TarFlowPipeline | TextToImage
    guidance: Guidance
    denoise: bool
    denoise_multiplier: float
    decoder: Decoder
    captions: Sequence[str] = ()

    def __call__(self, key: jax.Array, number: int, labels: Any) -> jax.Array:
        """Returns float32 [number, H, W, K] in about [-1, 1]."""
        if isinstance(self.model, TarFlowPipeline):
            return self.model.sample(
                key, number, labels, self.guidance, self.denoise, self.denoise_multiplier, self.decoder
            )
        prompts = None
        if self.captions:
            prompts, number, labels = [self.captions[i] for i in labels], 1, None
        options = {"labels": labels, "decoder": self.decoder, "denoise": self.denoise}
        return self.model(prompts, number, self.guidance, key, **options)

    def protocol(self) -> dict[str, Any]:
        """Returns all that the images depend on besides the key and the labels, for JSON."""
        flow = self.model if isinstance(self.model, TarFlowPipeline) else self.model.flow
        denoising = {"multiplier": self.denoise_multiplier, "method": DEFAULT_DENOISING.to_dict()}
        protocol: dict[str, Any] = {
            "fingerprint": fingerprint(flow.variables),
            "config": flow.config.to_dict(),
            "noise": flow.noise and flow.noise.to_dict(),
            "guidance": self.guidance.to_dict() if self.guidance.weight else None,
            "denoising": denoising if self.denoise else None,
            "decoder": repr(self.decoder),
        }
        if isinstance(self.decoder, Student):
            student = flow.require_student()
            protocol["student"] = [fingerprint(student.variables), student.config.to_dict()]
        if isinstance(self.model, TextToImage):
            autoencoder, text = self.model.autoencoder, self.model.text
            protocol["autoencoder"] = [fingerprint(autoencoder.params), autoencoder.config.to_dict()]
            protocol |= {"text_encoder": text and text.fingerprint, "captions": self.captions}
        return protocol


class Samples(NamedTuple):
    """Samples of a model, including its failures: pixels that were NaN or infinite are grey."""

    images: np.ndarray  # uint8 [N, H, W, K]
    labels: np.ndarray | None  # int32 [N]
    num_not_finite: int  # images with such pixels


def quantise(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rounds float images [B, H, W, K] in [-1, 1] to uint8; also returns bool [B], whether any pixel is not finite."""
    finite = np.isfinite(images)
    values = to_uint8(np.where(finite, images, 0))
    return np.where(finite, values, np.uint8(NOT_FINITE)), ~finite.all((1, 2, 3))


def labels_in_proportion(class_counts: Counts, num_images: int) -> np.ndarray | None:
    """Returns labels int32 [num_images] in which every prefix has each class in proportion to `class_counts` [C].

    The next label is the class that is furthest behind, the lowest in a tie: 0, 1, 2 … in turn for equal counts.
    Returns None without classes.
    """
    if not len(class_counts):
        return None
    share, drawn = np.asarray(class_counts, np.int64), np.zeros(len(class_counts), np.int64)
    total = share.sum()
    labels = np.empty(num_images, np.int32)
    for i in range(num_images):
        labels[i] = np.argmax(share * (i + 1) - total * drawn)
        drawn[labels[i]] += 1
    return labels


def label_counts(num_classes: int, reference: ImageSource | None) -> tuple[np.ndarray, str]:
    """Returns how often samples have each label, as coprime integers [C], and the words for it in a protocol.

    As often as in the reference, if known: otherwise a distance would measure the labels, not the images.
    """
    if not num_classes:
        return np.zeros(0, np.int64), "none"
    if reference is not None:
        counts = reference.class_counts()
        if len(counts) == num_classes and counts.any():
            return counts // np.gcd.reduce(counts), "as often as in the reference split"
    return np.ones(num_classes, np.int64), "in turn"


def draw_samples(
    sampler: Sampler,
    root: epath.PathLike,
    num_images: int,
    class_counts: Counts,
    seed: int,
    chunk_size: int = CHUNK_SIZE,
) -> epath.Path:
    """Draws the missing chunks of `num_images` samples; returns their folder when all processes are done.

    The folder, in `root`, is named by the hash of all that the samples depend on, and holds that as protocol.json. Each
    process draws its share, with the labels of `labels_in_proportion`. Every chunk is drawn in full, so the first
    images do not depend on `num_images`.
    """
    counts = np.asarray(class_counts, np.int64).tolist()
    protocol = sampler.protocol() | {"seed": seed, "chunk_size": chunk_size, "class_counts": counts}
    text = json.dumps(protocol, indent=2, sort_keys=True)
    folder = epath.Path(root) / hashlib.sha256(text.encode()).hexdigest()[:16]
    write_text(folder / "protocol.json", text)
    num_chunks = -(-num_images // chunk_size)
    labels = labels_in_proportion(class_counts, num_chunks * chunk_size)
    mine = range(jax.process_index(), num_chunks, jax.process_count())
    for index in progress(mine, f"samples, {chunk_size} at a time"):
        path = folder / CHUNK.format(index)
        if path.exists():
            continue
        key = jax.random.fold_in(jax.random.key(seed), index)
        chosen = slice(index * chunk_size, (index + 1) * chunk_size)
        drawn = sampler(key, chunk_size, None if labels is None else jnp.asarray(labels[chosen]))
        images, not_finite = quantise(np.asarray(drawn))
        write_npz(path, images=images, not_finite=not_finite)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"samples in {folder}")
    return folder


def read_chunks(folder: epath.PathLike, num_images: int, class_counts: Counts, chunk_size: int = CHUNK_SIZE) -> Samples:
    """Reads the first `num_images` samples of a folder; raises FileNotFoundError if a chunk is missing."""
    images, not_finite = [], []
    for index in range(-(-num_images // chunk_size)):
        path = epath.Path(folder) / CHUNK.format(index)
        try:
            chunk = read_npz(path, ("images", "not_finite"))
            if len(chunk) < 2 or len(chunk["images"]) != chunk_size:
                raise UserError(f"{path} is not a chunk of {chunk_size} samples")
        except UserError as error:
            raise UserError(f"{error}; delete it and run again") from error
        images.append(chunk["images"])
        not_finite.append(chunk["not_finite"])
    num_not_finite = int(np.concatenate(not_finite)[:num_images].sum())
    labels = labels_in_proportion(class_counts, num_images)
    return Samples(np.concatenate(images)[:num_images], labels, num_not_finite)


def write_samples(path: epath.PathLike, images: np.ndarray, labels: np.ndarray | None = None) -> None:
    """Writes an ADM sample file: `arr_0`, uint8 [N, H, W, 3] with grey repeated, and `arr_1`, the labels if given."""
    arrays = {"arr_0": as_colour(images)}
    if labels is not None:
        arrays["arr_1"] = labels
    write_npz(path, **arrays)


def read_samples(path: epath.PathLike) -> np.ndarray:
    """Reads the images uint8 [N, H, W, K] of an ADM sample file; raises UserError for others."""
    images = read_npz(path, ("arr_0",)).get("arr_0")
    if images is None or images.ndim != 4 or images.dtype != np.uint8 or images.shape[-1] not in (1, 3):
        raise UserError(f"{path} has no samples: expected arr_0 as uint8 [N, H, W, 1 or 3]")
    return images


def as_colour(images: np.ndarray) -> np.ndarray:
    """Repeats grey images [N, H, W, 1] to [N, H, W, 3], which Inception and ADM's files expect."""
    return np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images
