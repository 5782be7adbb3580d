"""The interface of image data sets: a random-access list of images with labels."""

import abc
import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from tarflow_jax.data.images import decode_image, preprocess
from tarflow_jax.errors import UserError

MANIFEST = "manifest.json"
NO_LABEL = -1
SPLITS = ("train", "test")
TEST_SHARE = 0.1
MAX_CLASSES = 1 << 20  # ImageNet-21k has 21,841


def split_of(name: str) -> str:
    """Assigns an image to "train" or "test" by a hash of its name, so that other images do not matter."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return "test" if int.from_bytes(digest[:8], "big") < TEST_SHARE * 2**64 else "train"


def checked_labels(name: str, labels: np.ndarray, count: int, num_classes: int) -> np.ndarray:
    """Returns labels as int32 [count]; raises UserError unless they are integers in [0, num_classes)."""
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"{name} are {labels.dtype} {list(labels.shape)}; expected integers [{count}]")
    if (outside := np.flatnonzero((labels < 0) | (labels >= num_classes))).size:
        row = outside[0]
        raise UserError(f"{name} have {labels[row]} in row {row}; expected integers from 0 to {num_classes - 1}")
    return labels.astype(np.int32)


def read_manifest(folder: epath.Path, expected_format: int | str) -> dict[str, Any]:
    """Reads the manifest of a prepared set; raises FileNotFoundError if there is none, UserError if it is damaged."""
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no prepared set; prepare one with launch.prepare_data")
    try:
        manifest = json.loads(path.read_text())
        if manifest["format"] == expected_format:
            return manifest
    except (ValueError, TypeError, KeyError):
        pass
    raise UserError(f"{path}: damaged or from another version; pack the set again")


@dataclasses.dataclass(frozen=True)
class OpenOptions:
    """How to open or prepare a set; see `registry.open_source`."""

    data_dir: Path
    image_size: tuple[int, int] | None = None
    preprocessing: str = "none"
    skip_bad: bool = False
    cache_bytes: int = 0


class ImageSource(abc.ABC):
    """A random-access list of images of one shape.

    `source[i]` is `{"image": uint8 or uint16 [H, W, K], "label": np.int32}`. The label is in [0, num_classes), or -1
    for an unlabelled image.
    """

    bits: int = 8  # per channel; 0 for latents, which are floats
    captions: Sequence[tuple[str, ...]] = ()  # alternative captions of each image; () if there are none
    condition_shape: tuple[int, ...] = ()  # shape of each image's condition; () if there is none
    preprocessing: str = "none"  # how images were resized; metrics are comparable only if this matches
    _content: str = ""  # distinguishes sets of the same size, shape and classes

    def __init__(
        self, name: str, image_shape: Sequence[int], num_classes: int, label_names: Sequence[str] = ()
    ) -> None:
        height, width, channels = image_shape
        self.name = name  # used in messages
        self.image_shape = (height, width, channels)
        self.num_classes = num_classes  # 0 for unlabelled sets
        self.label_names = tuple(label_names)  # one per class, or ()

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @property
    def units(self) -> dict[str, np.ndarray]:
        """Values of the flow's constants that the data determine."""
        return {}

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) of the images and labels, independent of where they are stored."""
        return self._fingerprint_with(self._content)

    def _fingerprint_with(self, content: str) -> str:
        described = (len(self), self.image_shape, self.label_names, self.preprocessing, content)
        return hashlib.sha256(repr(described).encode()).hexdigest()

    def class_counts(self) -> np.ndarray:
        """Returns the number of images of each class, int64 [num_classes]."""
        labels = np.array(self.all_labels())
        return np.bincount(labels[labels != NO_LABEL], minlength=self.num_classes)

    def all_labels(self) -> list[int]:
        """Returns the label of every image."""
        return [self[index]["label"] for index in range(len(self))]

    def read(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Reads the given images, uint8 or uint16 [N, H, W, K], and their labels, int32 [N]."""
        items = [self[int(index)] for index in indices]
        return np.stack([item["image"] for item in items]), np.array([item["label"] for item in items], np.int32)


class ArraySource(ImageSource):
    """A source whose decoded images are in memory."""

    def __init__(
        self,
        name: str,
        images: np.ndarray,
        labels: np.ndarray | None = None,
        num_classes: int = 0,
        label_names: Sequence[str] = (),
    ) -> None:
        """Takes uint8 or uint16 images [N, H, W, K] and integer labels [N] or None; raises UserError for others."""
        if images.ndim != 4 or images.dtype not in (np.uint8, np.uint16) or not len(images):
            got = f"{images.dtype} {list(images.shape)}; floats are for tarflow_jax.fit"
            raise UserError(f"{name}: expected images as uint8 or uint16 [N, H, W, K] with N > 0, got {got}")
        super().__init__(name, images.shape[1:], num_classes, label_names)
        self.images, self.bits = images, 8 * images.itemsize
        self.labels = np.full(len(images), NO_LABEL, np.int32)
        if labels is not None and num_classes:
            self.labels = checked_labels(f"{name}: labels", labels, len(images), num_classes)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "label": self.labels[index]}

    def read(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.images[indices], self.labels[indices]

    @functools.cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(np.ascontiguousarray(self.images).data)
        digest.update(np.ascontiguousarray(self.labels).data)
        return self._fingerprint_with(digest.hexdigest())


class Item(NamedTuple):
    """An encoded image, read on demand."""

    name: str  # within its set
    label: int
    read: Callable[[], bytes]
    stamp: str = ""  # changes whenever the image does
    captions: tuple[str, ...] = ()  # alternatives


class EncodedSource(ImageSource):
    """A source of encoded images, which are decoded and preprocessed when they are read.

    Caches as many decoded images as fit into `options.cache_bytes`.
    """

    def __init__(
        self,
        name: str,
        num_images: int,
        item_at: Callable[[int], Item],
        options: OpenOptions,
        *,
        content: str,
        image_shape: tuple[int, int, int],
        bits: int = 8,
        label_names: Sequence[str] = (),
        class_counts: Sequence[int] | None = None,
    ) -> None:
        """Builds a source from `item_at`, which returns the encoded image at an index.

        `content` identifies the images and labels (see `fingerprint`). If `class_counts` is None, classes are counted
        on request.
        """
        super().__init__(name, image_shape, len(label_names), label_names)
        if num_images == 0:
            raise UserError(f"{name}: no images")
        self.preprocessing = self._resize_by = options.preprocessing
        self._num_images, self._item_at, self.bits = num_images, item_at, bits
        self._content, self._class_counts = content, class_counts
        self._cache: dict[int, dict[str, Any]] = {}
        self._num_cached = options.cache_bytes // (math.prod(self.image_shape) * bits // 8)

    def __len__(self) -> int:
        return self._num_images

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index in self._cache:
            return self._cache[index]
        item = self._item_at(index)
        try:
            image = decode_image(item.read(), self.image_shape[2], bits=self.bits)
            array = preprocess(image, self._resize_by, self.image_shape[:2])
        except ValueError as error:
            raise UserError(f"{self.name}: {item.name}: {error}") from None
        example = {"image": array, "label": np.int32(item.label)}
        if index < self._num_cached:
            self._cache[index] = example
        return example

    def class_counts(self) -> np.ndarray:
        counts = self._class_counts
        return super().class_counts() if counts is None else np.array(counts, np.int64)

    def all_labels(self) -> list[int]:  # without decoding the images
        return [self._item_at(index).label for index in range(len(self))]
