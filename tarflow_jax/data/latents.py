"""Packs and opens autoencoder latents and caption embeddings, the training data of a flow over latents.

A folder holds memory-mapped arrays for each split:

    SPLIT-mean.npy, SPLIT-std.npy    float16 [N, h, w, Z]: each image's latents, in the flow's units
    SPLIT-text.npy                   float16 [M, L, E]: embeddings of the captions in SPLIT-captions.json
    null.npy                         float32 [L, E]: embedding of the empty caption
    SPLIT-rows.npy                   int32 [R, 3]: image, caption (-1 for none) and label of each image-caption pair

manifest.json is written last; until then, repeating the call resumes. autoencoder/ and text/ in the same folder decode
samples and embed prompts.
"""

import contextlib
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from tarflow_jax.data.images import BACKGROUND
from tarflow_jax.data.source import MANIFEST, ImageSource, OpenOptions, read_manifest
from tarflow_jax.errors import UserError
from tarflow_jax.figures import to_pil
from tarflow_jax.files import replacing, sha256, write_text
from tarflow_jax.noise import to_float

FORMAT = "tarflow_jax latents 1"
IMAGES_AT_A_TIME, CAPTIONS_AT_A_TIME = 64, 256
MAX_SCALE, MAX_SHIFT = 0.1, 0.05  # of an augmented copy, as a fraction of the image's side
MOVED = "moved, "  # begins a copy's captions, so that a flow does not draw copies where it is asked for originals


class Latents(NamedTuple):
    """Means and standard deviations of images' latents, in place of a batch's images."""

    mean: Any  # float32 [B, h, w, Z]
    std: Any  # float32 [B, h, w, Z]
    condition: Any = None  # float32 [B, L, E]


class LatentSource(ImageSource):
    """One split of a folder written by `pack_latents`, with a row for each pair of an image and a caption."""

    bits = 0

    def __init__(self, name: str, folder: Path, split: str, manifest: Mapping[str, Any]) -> None:
        latent_shape, text_shape = (tuple(map(int, manifest[key])) for key in ("latent_shape", "text_shape"))
        super().__init__(name, latent_shape, len(manifest["label_names"]), manifest["label_names"])
        self.folder, self.images_name, self.condition_shape = folder, str(manifest["source"]), text_shape
        self._content = str(manifest["splits"][split]["sha256"])
        self._mean = np.load(folder / f"{split}-mean.npy", mmap_mode="r")
        self._std = np.load(folder / f"{split}-std.npy", mmap_mode="r")
        self._rows = np.load(folder / f"{split}-rows.npy", mmap_mode="r")
        if self._rows[:, 0].max() >= len(self._mean):
            raise UserError(f"{name}: {split}-rows.npy is damaged; pack the set again")
        if text_shape:
            self._null = np.load(folder / "null.npy", mmap_mode="r")
            self._text = np.load(folder / f"{split}-text.npy", mmap_mode="r")
            texts = json.loads((folder / f"{split}-captions.json").read_text())
            self.captions = [(texts[caption],) for caption in self._rows[:, 1]]

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def units(self) -> dict[str, np.ndarray]:
        """The embedding of the empty caption, which replaces the captions that training drops."""
        return {"null_prefix": np.asarray(self._null)} if self.condition_shape else {}

    def __getitem__(self, index: int) -> dict[str, Any]:
        latents, labels = self.read([index])
        return {"image": latents.mean[0], "label": labels[0]}

    def read(self, indices: Sequence[int] | np.ndarray) -> tuple[Any, np.ndarray]:
        """Reads `Latents` and labels of the given rows."""
        image, caption, label = self._rows[np.asarray(indices)].T
        condition = self._text[caption].astype(np.float32) if self.condition_shape else None
        return Latents(self._mean[image].astype(np.float32), self._std[image].astype(np.float32), condition), label

    def all_labels(self) -> list[int]:
        return self._rows[:, 2].tolist()


def open_latents(argument: str, split: str, options: OpenOptions) -> LatentSource:
    """Opens one split of a folder; raises UserError if it is damaged, FileNotFoundError if it is incomplete."""
    folder, name = Path(argument).expanduser(), f"latents:{argument}"
    try:
        return LatentSource(name, folder, split, read_manifest(folder, FORMAT))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise UserError(f"{name}: damaged ({error!r}); pack the set again") from None


def pack_latents(
    folder: Path,
    sources: Mapping[str, ImageSource],
    encode: Callable[[Any], tuple[Any, Any]],
    embed: Callable[[Sequence[str]], np.ndarray] | None,
    fingerprint: str,
    copies: int = 0,
) -> None:
    """Encodes the images and captions of every split, or resumes an interrupted call.

    Args:
      encode: images float32 [B, H, W, K] in [-1, 1] -> mean and std [B, h, w, Z] in the flow's units.
      embed: captions -> float32 [B, L, E]; None leaves captions out.
      fingerprint: identifies the encoders; with the sources' fingerprints, it identifies the set.
      copies: number of randomly shifted and scaled copies of each training image to encode too. Their captions begin
        with "moved".

    Raises UserError if the folder holds another set or captions are missing.
    """
    contents = [source.fingerprint + repr(source.captions) * bool(embed) for source in sources.values()]
    fingerprint = hashlib.sha256(repr((fingerprint, copies, MOVED, contents)).encode()).hexdigest()
    if (folder / MANIFEST).exists():
        if read_manifest(folder, FORMAT)["fingerprint"] != fingerprint:
            raise UserError(f"{folder} holds other latents; remove it, or choose another folder")
        return
    splits = {}
    for split, source in sources.items():
        if embed and not source.captions:
            raise UserError(f"{source.name} has no captions in its {split} split; leave --text_encoder out")
        num_copies = copies if split == "train" else 0
        count = len(source) * (1 + num_copies)
        files = [folder / f"{split}-{name}.npy" for name in ("mean", "std")]
        _fill(files, count, fingerprint, IMAGES_AT_A_TIME, functools.partial(_encoded, source, encode))
        texts = list(source.captions) if embed else [("",)] * len(source)
        if split == "test":
            texts = [wordings[:1] for wordings in texts]
        texts += [tuple(MOVED + text for text in wordings) for wordings in texts] * num_copies
        known = {text: number for number, text in enumerate(dict.fromkeys(itertools.chain(*texts)))}
        if embed:
            captions = functools.partial(_embedded, list(known), embed)
            _fill([folder / f"{split}-text.npy"], len(known), fingerprint, CAPTIONS_AT_A_TIME, captions)
            write_text(folder / f"{split}-captions.json", json.dumps(list(known)) + "\n")
        labels, size = source.all_labels(), len(source)
        rows = [(i, known[text] if embed else -1, labels[i % size]) for i in range(count) for text in texts[i]]
        _save(folder / f"{split}-rows.npy", np.array(rows, np.int32))
        hashes = [sha256(folder / f"{split}-{name}.npy") for name in ("mean", "std", "rows")]
        sizes = {"images": count, "captions": len(known), "rows": len(rows)}
        splits[split] = {**sizes, "sha256": " ".join(hashes)}
    text_shape: tuple[int, ...] = ()
    if embed:
        null = embed([""])[0]
        text_shape = null.shape
        _save(folder / "null.npy", null)
    manifest = {
        "format": FORMAT,
        "source": sources["train"].name,
        "fingerprint": fingerprint,
        "latent_shape": np.load(folder / "train-mean.npy", mmap_mode="r").shape[1:],
        "text_shape": text_shape,
        "label_names": sources["train"].label_names,
        "splits": splits,
    }
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    for progress in [*folder.glob("*-mean.json"), *folder.glob("*-text.json")]:
        progress.unlink()


def _encoded(source: ImageSource, encode: Callable[[Any], tuple[Any, Any]], index: np.ndarray) -> Any:
    """Returns the mean and std of images' latents; indices from len(source) on are augmented copies."""
    images, _ = source.read(index % len(source))
    images = np.stack([moved(image, i) if i >= len(source) else image for image, i in zip(images, index, strict=True)])
    return encode(to_float(images))


def _embedded(captions: list[str], embed: Callable[[Sequence[str]], np.ndarray], index: np.ndarray) -> Any:
    return (embed([captions[i] for i in index]),)


def moved(image: np.ndarray, seed: int) -> np.ndarray:
    """Returns a slightly shifted and scaled copy of an image uint8 [H, W, K], padded with the background."""
    rng, (height, width, _) = np.random.default_rng(seed), image.shape
    margin = round(max(height, width) * (MAX_SCALE + MAX_SHIFT))
    padded = np.pad(image, [(margin, margin), (margin, margin), (0, 0)], constant_values=BACKGROUND)
    scale = 1 + MAX_SCALE * rng.uniform(-1, 1)
    down, right = MAX_SHIFT * rng.uniform(-1, 1, 2)
    top, left = margin + height * ((1 - scale) / 2 + down), margin + width * ((1 - scale) / 2 + right)
    box = (left, top, left + scale * width, top + scale * height)
    return np.asarray(to_pil(padded).resize((width, height), Image.Resampling.BICUBIC, box)).reshape(image.shape)


def _fill(
    files: list[Path], count: int, fingerprint: str, size: int, rows: Callable[[np.ndarray], tuple[Any, ...]]
) -> None:
    """Writes `count` rows of float16 arrays, `size` at a time, resuming where an interrupted call stopped."""
    progress, done, arrays = files[0].with_suffix(".json"), 0, []
    progress.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        stored = json.loads(progress.read_text())
        if stored["fingerprint"] == fingerprint:
            arrays = [np.lib.format.open_memmap(file, mode="r+") for file in files]
            done = stored["done"]
    with tqdm(total=count, initial=done, desc=files[0].stem, disable=None) as bar:
        while done < count:
            index = np.arange(done, min(done + size, count))
            for k, values in enumerate(map(np.asarray, rows(index))):
                if not done:
                    shape = (count, *values.shape[1:])
                    arrays.append(np.lib.format.open_memmap(files[k], mode="w+", dtype=np.float16, shape=shape))
                arrays[k][index] = values
                arrays[k].flush()
            done += len(index)
            write_text(progress, json.dumps({"fingerprint": fingerprint, "done": done}) + "\n")
            bar.update(len(index))


def _save(path: Path, array: np.ndarray) -> None:
    with replacing(path) as file:
        np.save(file, array)
