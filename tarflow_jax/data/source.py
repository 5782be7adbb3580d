"""What every data set looks like from outside: a random-access list of uint8 images with labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

NO_LABEL = -1


class ImageSource:
    """A random-access list of images of one shape.

    `source[i]` is `{"image": uint8 [H, W, K], "label": np.int32}`; the label lies in [0, num_classes), or is -1 where
    the source has no labels.

    Attributes:
      name: the name it was opened by, for messages.
      image_shape: (H, W, K).
      num_classes: the number of classes; 0 means unlabelled.
      label_names: one name a class, or () where there are none.
    """

    name: str
    image_shape: tuple[int, int, int]
    num_classes: int
    label_names: tuple[str, ...]

    def __init__(
        self, name: str, image_shape: Sequence[int], num_classes: int, label_names: Sequence[str] = ()
    ) -> None:
        height, width, channels = (int(size) for size in image_shape)
        self.name = name
        self.image_shape = (height, width, channels)
        self.num_classes = int(num_classes)
        self.label_names = tuple(label_names)

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict[str, Any]:
        raise NotImplementedError

    def read(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 [N, H, W, K] and labels int32 [N] of the given indices."""
        items = [self[int(index)] for index in indices]
        images = np.stack([item["image"] for item in items]) if items else np.empty((0, *self.image_shape), np.uint8)
        return images, np.array([item["label"] for item in items], np.int32)


class ArraySource(ImageSource):
    """A source whose decoded images lie in memory."""

    def __init__(
        self,
        name: str,
        images: np.ndarray,
        labels: np.ndarray | None = None,
        num_classes: int = 0,
        label_names: Sequence[str] = (),
    ) -> None:
        """Takes uint8 images [N, H, W, K] and integer labels [N], or None. Raises ValueError for anything else."""
        if images.ndim != 4 or images.dtype != np.uint8 or not len(images):
            raise ValueError(
                f"{name}: expected images as uint8 [N, H, W, K] with N > 0, got {images.dtype} {list(images.shape)}"
            )
        super().__init__(name, images.shape[1:], num_classes, label_names)
        self.images = images
        self.labels = check_labels(name, labels, len(images), num_classes)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "label": self.labels[index]}

    def read(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.images[indices], self.labels[indices]


def check_labels(name: str, labels: np.ndarray | None, num_images: int, num_classes: int) -> np.ndarray:
    """Labels as int32 [N], all -1 where there are none; ValueError unless there is one a picture, inside its range."""
    if labels is None or num_classes == 0:
        return np.full(num_images, NO_LABEL, np.int32)
    labels = np.asarray(labels)
    if labels.shape != (num_images,) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{name}: expected {num_images} integer labels, one an image, got {labels.dtype} {list(labels.shape)}"
        )
    outside = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(outside):
        raise ValueError(
            f"{name}: label {labels[outside[0]]} of image {outside[0]} is out of range; "
            f"labels of {num_classes} classes are 0 to {num_classes - 1}"
        )
    return labels.astype(np.int32)
