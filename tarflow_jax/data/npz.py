"""Images from a NumPy archive: `images` and perhaps `labels`, or `arr_0` and `arr_1` as ADM names them."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from tarflow_jax.data.source import ArraySource
from tarflow_jax.data.splits import split_of
from tarflow_jax.errors import UserError


def open_npz(path: Path, split: str) -> ArraySource:
    """Reads one split of an archive into memory; the split is by the stable hash of the image's index.

    Raises FileNotFoundError, or ValueError where the file holds no uint8 images [N, H, W] or [N, H, W, K].
    """
    name = f"npz:{path}"
    if not path.is_file():
        raise FileNotFoundError(f"{name}: no such file")
    try:
        # Opened here, since np.load leaves a damaged file open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            images = archive["images" if "images" in archive else "arr_0"]
            labels = archive.get("labels" if "labels" in archive else "arr_1")
    except (ValueError, KeyError, OSError, EOFError, MemoryError, AttributeError) as error:
        raise UserError(f"{name}: {_EXPECTED} ({error})") from None
    except (zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise UserError(f"{name}: damaged archive ({error})") from None
    if images.ndim == 3:
        images = images[..., None]
    num_classes = int(labels.max()) + 1 if labels is not None and labels.size else 0
    everything = ArraySource(name, images, labels, num_classes)
    chosen = [index for index in range(len(images)) if split_of(str(index)) == split]
    return ArraySource(name, everything.images[chosen], everything.labels[chosen], num_classes)


_EXPECTED = "expected an .npz with uint8 arrays `images` and `labels`, or `arr_0` and `arr_1`"
