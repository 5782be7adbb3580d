"""Data sets that are held in memory: digits, Fashion-MNIST and npz files."""

import gzip
import zlib
from pathlib import Path

import numpy as np

from tarflow_jax.data.source import MAX_CLASSES, ArraySource, OpenOptions, split_of
from tarflow_jax.errors import UserError
from tarflow_jax.files import read_npz

NUM_TRAIN_DIGITS = 1500
_MAX_IDX_BYTES = 1 << 30  # limit on the decompressed size; Fashion-MNIST takes 47 MB
FASHION_MNIST_LABELS = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def open_digits(argument: str, split: str, options: OpenOptions) -> ArraySource:
    """Opens scikit-learn's 1,797 handwritten 8x8 digits; grey levels v from 0 to 16 become round(255 v / 16).

    In scikit-learn's order, "train" is the first 1,500 digits and "test" the last 297.
    """
    from sklearn.datasets import load_digits  # slow to import

    digits = load_digits()
    rows = slice(NUM_TRAIN_DIGITS) if split == "train" else slice(NUM_TRAIN_DIGITS, None)
    images = np.rint(digits.images[rows] * (255 / 16)).astype(np.uint8)
    return ArraySource("digits", images[..., None], digits.target[rows], 10, list(map(str, range(10))))


def open_npz(argument: str, split: str, options: OpenOptions) -> ArraySource:
    """Opens one split of an npz file with `images` and optional `labels`, or ADM's `arr_0` and `arr_1`.

    Images are uint8 or uint16, [N, H, W] or [N, H, W, K]. A hash of its index assigns each image to a split.
    """
    path = Path(argument).expanduser()
    name = f"npz:{path}"
    arrays = read_npz(path, ("images", "labels", "arr_0", "arr_1"))
    images, labels = arrays.get("images", arrays.get("arr_0")), arrays.get("labels", arrays.get("arr_1"))
    if images is None:
        raise UserError(f"{name}: expected uint8 arrays `images` and `labels`, or `arr_0` and `arr_1`")
    if images.ndim == 3:
        images = images[..., None]
    num_classes = 0 if labels is None else 1
    if labels is not None and labels.size and labels.dtype.kind in "iu":
        num_classes = min(int(labels.max()) + 1, MAX_CLASSES)
    everything = ArraySource(name, images, labels, num_classes)  # validates dtypes, shapes and labels
    rows = [index for index in range(len(images)) if split_of(str(index)) == split]
    if not rows:
        raise UserError(f"{name}: none of its {len(images)} images falls into the {split} split; expected more images")
    return ArraySource(name, *everything.read(rows), num_classes)


def open_fashion_mnist(argument: str, split: str, options: OpenOptions) -> ArraySource:
    """Opens Fashion-MNIST (60,000 training and 10,000 test images, 28x28x1, 10 classes) from gzip IDX files."""
    folder = Path(argument or "/usr/share/datasets/fashion-mnist").expanduser()  # where Debian's package puts it
    prefix = {"train": "train", "test": "t10k"}[split]
    images = _read_idx(folder / f"{prefix}-images-idx3-ubyte.gz", 3)
    labels = _read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", 1)
    return ArraySource("fashion_mnist", images[..., None], labels, 10, FASHION_MNIST_LABELS)


def _read_idx(path: Path, num_dimensions: int) -> np.ndarray:
    """Reads a uint8 array from a gzip IDX file; raises UserError if it is damaged or another kind of file."""
    if not path.is_file():
        raise FileNotFoundError(
            f"fashion_mnist: {path} not found; install Debian's package (apt-get install dataset-fashion-mnist), "
            "or name the folder of the four gzip IDX files: fashion_mnist:PATH"
        )
    try:
        with gzip.open(path) as file:
            content = file.read(_MAX_IDX_BYTES)
        shape = np.frombuffer(content, ">u4", num_dimensions, offset=4)
        if content[:4] != bytes([0, 0, 8, num_dimensions]):
            raise UserError("its header says otherwise")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * num_dimensions).reshape(shape)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        expected = f"expected a gzip IDX file of unsigned bytes with {num_dimensions} dimension(s)"
        raise UserError(f"{path}: {expected}, got a damaged one or another ({error}); copy the file again") from None
