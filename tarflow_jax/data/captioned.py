"""Packs captioned data sets: emoji of several vendors, openclipart, and webdataset tar files."""

import dataclasses
import functools
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tarflow_jax.data.emoji import HOW, MAX_MEMBER_BYTES, drawing, read_package
from tarflow_jax.data.folder import EXTENSIONS, list_folder
from tarflow_jax.data.packed import pack_as
from tarflow_jax.data.source import MAX_CLASSES, NO_LABEL, SPLITS, Item, Options, split_of
from tarflow_jax.errors import UserError

_SKIN_TONES = {"1F3FB": "light", "1F3FC": "medium light", "1F3FD": "medium", "1F3FE": "medium dark", "1F3FF": "dark"}


def prepare_emoji_text(argument: str, options: Options) -> str:
    """Packs emoji and their names from the npm packages (tgz) in the folder `argument`.

    These are one or more emoji-datasource-VENDOR, at 64x64, and optionally lobehub-fluent-emoji-3d. Captions are the
    name, and the name and short name with the vendor. A hash of the code points decides the split, as in emoji64.
    """
    packages = sorted(Path(argument).expanduser().glob("*.tgz"))  # one with emoji.json sorts first
    if not packages:
        raise FileNotFoundError(f"emoji_text: no packages (tgz) in {argument}; {HOW}")
    contents = [read_package(path) for path in packages]
    splits: dict[str, list[Item]] = {split: [] for split in SPLITS}
    try:
        entries = json.loads(contents[0]["emoji.json"])
        label_names = tuple(sorted({entry["category"] for entry in entries}))
        for path, content in zip(packages, contents, strict=True):
            vendor, drawings = _drawings(path, content)
            for entry in entries:
                label = label_names.index(entry["category"])
                for tone, code in [("", entry["unified"]), *_tones(entry)]:
                    if image := drawings.get(code.lower()):
                        item = drawing(f"{vendor} {code}", image, label, _wordings(entry, tone, vendor))
                        splits[split_of(entry["unified"])].append(item)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"emoji_text: {argument} are not packages of emoji ({error!r}); {HOW}") from None
    return pack_as("emoji_text", f"emoji_text:{argument}", splits, label_names, _resized(options, (64, 64)))


def _drawings(path: Path, content: dict[str, bytes]) -> tuple[str, dict[str, bytes]]:
    """Returns a package's vendor, and its images by their lower-case code points."""
    files = [name for name in content if name != "emoji.json"]
    if not files:
        raise UserError(f"emoji_text: {path} has no drawings; {HOW}")
    vendor = "fluent" if files[0].startswith("assets/") else files[0].split("/")[1]
    return vendor, {Path(name).stem: content[name] for name in files}


def _tones(entry: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for tone, variant in entry.get("skin_variations", {}).items():
        names = [_SKIN_TONES[each] for each in tone.split("-")]
        yield f" with {' and '.join(dict.fromkeys(names))} skin tone", variant["unified"]


def _wordings(entry: dict[str, Any], tone: str, vendor: str) -> tuple[str, ...]:
    names = [entry["name"] or entry["short_name"], entry["short_name"]]
    texts = [" ".join(re.findall(r"[^\W_]+", name.lower())) + tone for name in names]
    return tuple(dict.fromkeys([texts[0], *(f"{text}, {vendor}" for text in texts)]))


def prepare_openclipart(argument: str, options: Options) -> str:
    """Packs the drawings of Debian's openclipart-png, with file names as captions and folders as labels."""
    root = Path(argument or "/usr/share/openclipart/png").expanduser()
    listings = {split: list_folder(root, split) for split in SPLITS}

    def captioned(item: Item) -> Item:
        words = re.findall(r"[^\W\d_]{2,}", Path(item.name).stem.lower())
        return item._replace(captions=(" ".join(words),) if words else ())

    splits = {split: [captioned(item) for item in items] for split, (items, _) in listings.items()}
    return pack_as("openclipart", "openclipart", splits, listings["train"][1], _resized(options, options.image_size))


def prepare_webdataset(argument: str, options: Options) -> str:
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
    names, stem = tuple(map(str, range(num_classes))), Path(argument.split(",")[0]).stem
    return pack_as(stem, f"webdataset:{argument}", splits, names, _resized(options, options.image_size))


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
                    elif text := content.decode() if ending == "txt" else json.loads(content).get("caption"):
                        captions[key] = (str(text).strip(),)
    except (tarfile.TarError, OSError, EOFError, ValueError, AttributeError) as error:
        raise UserError(f"webdataset:{path} is no whole, uncompressed tar file of samples ({error})") from None
    if wrong := [key for key, label in labels.items() if not 0 <= label < MAX_CLASSES]:
        raise UserError(f"webdataset:{path}: the class of {wrong[0]} is {labels[wrong[0]]}; expected 0 or more")

    def read(offset: int, size: int) -> bytes:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(size)

    items = []
    for key, place in images.items():
        label, texts = labels.get(key, NO_LABEL), captions.get(key, ())
        items.append(Item(f"{path.name}{key}", label, functools.partial(read, *place), str(place), texts))
    return items


def _resized(options: Options, image_size: tuple[int, int] | None) -> Options:
    """Returns options with this size, and preprocessing "adm" unless another was chosen."""
    chosen = "adm" if options.preprocessing == "none" else options.preprocessing
    return dataclasses.replace(options, image_size=image_size, preprocessing=chosen)
