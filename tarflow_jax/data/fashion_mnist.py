"""Fashion-MNIST from its four gz IDX files: 60,000 and 10,000 grey images of 28x28 in 10 classes."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from tarflow_jax.data.source import ArraySource, Options
from tarflow_jax.errors import UserError

# Where Debian's package dataset-fashion-mnist puts them.
DEFAULT_FOLDER = Path("/usr/share/datasets/fashion-mnist")

LABEL_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def open_fashion_mnist(argument: str, split: str, options: Options) -> ArraySource:
    """Reads one split into memory from the folder `argument`, by default where Debian puts the files."""
    folder = Path(argument).expanduser() if argument else DEFAULT_FOLDER
    prefix = {"train": "train", "test": "t10k"}[split]
    paths = [folder / f"{prefix}-images-idx3-ubyte.gz", folder / f"{prefix}-labels-idx1-ubyte.gz"]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(
                f"fashion_mnist: {path} not found; install Debian's package (apt-get install "
                "dataset-fashion-mnist), or name the folder of the four gz IDX files: fashion_mnist:PATH"
            )
    images, labels = read_idx(paths[0], 3), read_idx(paths[1], 1)
    return ArraySource("fashion_mnist", images[..., None], labels, 10, LABEL_NAMES)


def read_idx(path: Path, num_dimensions: int) -> np.ndarray:
    """The uint8 array of a gz IDX file; ValueError where the file is anything else, or truncated."""
    wanted = f"expected a gzip IDX file of unsigned bytes with {num_dimensions} dimension(s)"
    try:
        with gzip.open(path, "rb") as file:
            header = file.read(4 + 4 * num_dimensions)
            if header[:4] != bytes([0, 0, 8, num_dimensions]) or len(header) != 4 + 4 * num_dimensions:
                raise UserError(f"{path}: {wanted}, but its header says otherwise")
            shape = [int(size) for size in np.frombuffer(header, ">u4", offset=4)]
            # One byte more than promised would show that the header is wrong, without reading an endless file.
            body = file.read(math.prod(shape) + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: {wanted}, got a damaged one ({error}); copy the file again") from None
    if len(body) != math.prod(shape):
        raise UserError(f"{path}: the header promises {shape}, but {len(body)} bytes follow; copy the file again")
    return np.frombuffer(body, np.uint8).reshape(shape)
