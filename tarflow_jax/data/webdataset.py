"""Packs the images, captions and labels of webdataset tar files."""

import functools
import json
import tarfile
from pathlib import Path

from tarflow_jax.data.folder import EXTENSIONS
from tarflow_jax.data.packed import pack_as
from tarflow_jax.data.source import MAX_CLASSES, NO_LABEL, SPLITS, Item, OpenOptions, split_of
from tarflow_jax.errors import UserError

MAX_MEMBER_BYTES = 16 * 2**20


def prepare_webdataset(argument: str, options: OpenOptions) -> str:
    """Packs the webdataset tar files at the comma-separated paths in `argument`.

    Members that share a name up to the extension form a sample: an image and, optionally, a caption (txt, or `caption`
    in json) and a class number (cls). A hash of the name decides the split.
    """
    splits: dict[str, list[Item]] = {split: [] for split in SPLITS}
    num_classes = 0
    for path in argument.split(","):
        for item in _samples(Path(path).expanduser()):
            num_classes = max(num_classes, item.label + 1)
            splits[split_of(item.name)].append(item)
    label_names, stem = tuple(map(str, range(num_classes))), Path(argument.split(",")[0]).stem
    return pack_as(stem, f"webdataset:{argument}", splits, label_names, options)


def _samples(path: Path) -> list[Item]:
    """Lists a tar file's images with captions and labels; each image is read from its offset when it is packed."""
    images: dict[str, tuple[int, int]] = {}  # offset and size
    captions: dict[str, tuple[str, ...]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                folder, _, file = member.name.rpartition("/")
                name, _, ending = file.partition(".")
                key = f"{folder}/{name}"
                if f".{ending.lower()}" in EXTENSIONS:
                    images[key] = member.offset_data, member.size
                elif ending in ("txt", "json", "cls") and member.isreg() and member.size <= MAX_MEMBER_BYTES:
                    content = archive.extractfile(member).read()  # type: ignore[union-attr]
                    if ending == "cls":
                        labels[key] = int(content)
                        if not 0 <= labels[key] < MAX_CLASSES:
                            raise ValueError(f"the class of {key} is {labels[key]}; expected 0 or more")
                    elif text := content.decode() if ending == "txt" else json.loads(content).get("caption"):
                        captions[key] = (str(text).strip(),)
    except (tarfile.TarError, OSError, EOFError, ValueError, AttributeError) as error:
        raise UserError(f"webdataset:{path} is not a complete, uncompressed tar file of samples ({error})") from None

    def read(offset: int, size: int) -> bytes:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(size)

    items = []
    for key, place in images.items():
        label, texts = labels.get(key, NO_LABEL), captions.get(key, ())
        items.append(Item(f"{path.name}{key}", label, functools.partial(read, *place), str(place), texts))
    return items
