"""What every data set looks like from outside: a random-access list of uint8 images with labels."""

import abc
import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tarflow_jax.data.images import check_preprocessing, decode_image, preprocess
from tarflow_jax.errors import UserError

NO_LABEL = -1


@dataclasses.dataclass(frozen=True)
class Options:
    """How to open or prepare a set; see `registry.open_source`."""

    data_dir: Path
    image_size: tuple[int, int] | None = None
    preprocessing: str = "none"
    skip_bad: bool = False


class ImageSource(abc.ABC):
    """A random-access list of images of one shape.

    `source[i]` is `{"image": uint8 [H, W, K], "label": np.int32}`; the label is in [0, num_classes), or is
    -1 where the source has no labels.
    """

    preprocessing: str = "none"  # what brought the images to their shape; figures under different ones do not compare

    def __init__(
        self, name: str, image_shape: Sequence[int], num_classes: int, label_names: Sequence[str] = ()
    ) -> None:
        height, width, channels = (int(size) for size in image_shape)
        self.name = name  # that it was opened by, for messages
        self.image_shape = (height, width, channels)
        self.num_classes = int(num_classes)  # 0 means unlabelled
        self.label_names = tuple(label_names)  # one a class, or () where there are none

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of what the images and labels are, not of where they are kept."""
        described = (len(self), self.image_shape, self.label_names, self.preprocessing, self._content())
        return hashlib.sha256(repr(described).encode()).hexdigest()

    def _content(self) -> str:
        """What tells these images and labels from others of the same number, shape and classes."""
        return ""

    @abc.abstractmethod
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def class_counts(self) -> np.ndarray:
        """int64 [num_classes]: how many images have each label."""
        return count_labels([self[index]["label"] for index in range(len(self))], self.num_classes)

    def read(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 [N, H, W, K] and labels int32 [N] of the given indices."""
        items = [self[int(index)] for index in indices]
        images = np.empty((len(items), *self.image_shape), np.uint8)
        for image, item in zip(images, items, strict=True):
            image[:] = item["image"]
        return images, np.array([item["label"] for item in items], np.int32)


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
        """Takes uint8 images [N, H, W, K] and integer labels [N], or None. Raises ValueError otherwise."""
        if images.ndim != 4 or images.dtype != np.uint8 or not len(images):
            got = f"{images.dtype} {list(images.shape)}"
            raise UserError(f"{name}: expected images as uint8 [N, H, W, K] with N > 0, got {got}")
        super().__init__(name, images.shape[1:], num_classes, label_names)
        self.images = images
        self.labels = check_labels(name, labels, len(images), num_classes)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "label": self.labels[index]}

    def class_counts(self) -> np.ndarray:
        return count_labels(self.labels, self.num_classes)

    def read(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.images[indices], self.labels[indices]

    def _content(self) -> str:
        digest = hashlib.sha256(np.ascontiguousarray(self.images).data)
        digest.update(np.ascontiguousarray(self.labels).data)
        return digest.hexdigest()


class EncodedSource(ImageSource):
    """A source of encoded images, each decoded and preprocessed when it is read."""

    def __init__(
        self,
        name: str,
        num_images: int,
        read_encoded: Callable[[int], tuple[bytes, int]],
        describe: Callable[[int], str],
        *,
        content: str,
        image_shape: tuple[int, int, int],
        preprocessing: str,
        num_classes: int,
        label_names: Sequence[str] = (),
        class_counts: Callable[[], np.ndarray],
    ) -> None:
        """Takes functions of the index: the encoded image with its label, and what to call it in an error.

        `content` tells these images and labels from others, see `fingerprint`. `class_counts` counts the labels,
        without decoding an image.
        """
        super().__init__(name, image_shape, num_classes, label_names)
        check_preprocessing(preprocessing)
        if num_images == 0:
            raise UserError(f"{name}: no images")
        self.preprocessing = self._preprocessing = preprocessing
        self._num_images = num_images
        self._read_encoded = read_encoded
        self._class_counts = class_counts
        self._describe = describe
        self._contents = content

    def __len__(self) -> int:
        return self._num_images

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            content, label = self._read_encoded(index)
            if self.num_classes and not NO_LABEL <= label < self.num_classes:
                raise UserError(f"label {label} is out of range; {self.num_classes} classes are expected")
            image = decode_image(content, self.image_shape[2])
            array = preprocess(image, self._preprocessing, self.image_shape[:2])
        except ValueError as error:
            raise UserError(f"{self._describe(index)}: {error}") from None
        return {"image": array, "label": np.int32(label if self.num_classes else NO_LABEL)}

    def class_counts(self) -> np.ndarray:
        return self._class_counts()

    def _content(self) -> str:
        return self._contents


class CachedSource(ImageSource):
    """Another source whose decoded images stay in memory once read: as many as fit into `max_bytes`."""

    def __init__(self, source: ImageSource, max_bytes: int) -> None:
        super().__init__(source.name, source.image_shape, source.num_classes, source.label_names)
        self.source = source
        self.preprocessing = source.preprocessing
        num_slots = min(len(source), max_bytes // int(np.prod(source.image_shape)))
        self._images = np.empty((num_slots, *source.image_shape), np.uint8)  # memory is taken when written to
        self._labels = np.empty(num_slots, np.int32)
        self._filled = np.zeros(num_slots, bool)

    def __len__(self) -> int:
        return len(self.source)

    def _content(self) -> str:
        return self.source._content()

    def class_counts(self) -> np.ndarray:
        return self.source.class_counts()

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        if index >= len(self._filled):
            return self.source[index]
        if not self._filled[index]:
            item = self.source[index]
            self._images[index], self._labels[index] = item["image"], item["label"]
            self._filled[index] = True  # last: other threads read the slot as soon as this is set
        return {"image": self._images[index], "label": self._labels[index]}


def count_labels(labels: Sequence[int] | np.ndarray, num_classes: int) -> np.ndarray:
    """int64 [num_classes]: how often each of the labels occurs; -1 does not count."""
    found = np.asarray(labels, np.int64)
    return np.bincount(found[found != NO_LABEL], minlength=num_classes)


def check_labels(name: str, labels: np.ndarray | None, num_images: int, num_classes: int) -> np.ndarray:
    """Labels as int32 [N], all -1 where there are none; ValueError unless each image has one in its range."""
    if labels is None or num_classes == 0:
        return np.full(num_images, NO_LABEL, np.int32)
    labels = np.asarray(labels)
    if labels.shape != (num_images,) or not np.issubdtype(labels.dtype, np.integer):
        got = f"{labels.dtype} {list(labels.shape)}"
        raise UserError(f"{name}: expected {num_images} integer labels, one an image, got {got}")
    outside = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(outside):
        raise UserError(
            f"{name}: label {labels[outside[0]]} of image {outside[0]} is out of range; "
            f"labels of {num_classes} classes are 0 to {num_classes - 1}"
        )
    return labels.astype(np.int32)
