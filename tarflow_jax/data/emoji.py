"""Emoji from npm's packages: emoji64, Google's 3,786 in 10 categories, and emoji_text, several vendors' with names.

A hash of an emoji's code points assigns it, with all of its skin-tone variants, to a split. Google's drawings are under
the Apache License 2.0, the packages emoji-datasource-VENDOR under the MIT licence.
"""

import dataclasses
import json
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tarflow_jax.data.packed import open_packed, pack, pack_as
from tarflow_jax.data.source import MANIFEST, SPLITS, EncodedSource, Item, OpenOptions, split_of
from tarflow_jax.errors import UserError

HOW = "get it with: npm pack emoji-datasource-google@16.0.0"
IMAGES = "img/google/64/"
MAX_MEMBER_BYTES = 16 * 2**20
_WANTED = re.compile(r"emoji\.json|img/\w+/64/[^/]+\.png|assets/[^/]+\.webp")
_SKIN_TONES = {"1F3FB": "light", "1F3FC": "medium light", "1F3FD": "medium", "1F3FE": "medium dark", "1F3FF": "dark"}


def open_emoji(argument: str, split: str, options: OpenOptions) -> EncodedSource:
    """Opens one split of the packed set; raises FileNotFoundError if it has not been packed."""
    folder = options.data_dir / "emoji64"
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(
            f"emoji64: not found in {folder}; {HOW}, "
            "then python -m launch.prepare_data --data=emoji64:emoji-datasource-google-16.0.0.tgz"
        )
    return open_packed(str(folder), split, options, "emoji64")


def prepare_emoji(argument: str, options: OpenOptions) -> str:
    """Packs the set from the package at the path `argument`, if given. Returns the name to open it by."""
    if not argument:
        return "emoji64"
    path = Path(argument).expanduser()
    content = read_package(path)
    entries, label_names = read_entries(path, content)
    splits: dict[str, list[Item]] = {split: [] for split in SPLITS}
    for entry in entries:
        variants = (entry, *entry.get("skin_variations", {}).values())
        label = label_names.index(entry["category"])
        names = [variant["image"] for variant in variants if variant["has_img_google"]]
        splits[split_of(entry["unified"])] += [drawing(name, content[IMAGES + name], label) for name in names]
    options = dataclasses.replace(options, image_size=(64, 64))
    pack("emoji64", splits, label_names, options.data_dir / "emoji64", options)
    return "emoji64"


def prepare_emoji_text(argument: str, options: OpenOptions) -> str:
    """Packs emoji and their names from the npm packages (tgz) in the folder `argument`.

    These are one or more emoji-datasource-VENDOR, at 64x64, and optionally lobehub-fluent-emoji-3d. Captions are the
    name, and the name and short name with the vendor.
    """
    packages = sorted(Path(argument).expanduser().glob("*.tgz"))  # one with emoji.json sorts first
    if not packages:
        raise FileNotFoundError(f"emoji_text: no packages (tgz) in {argument}; {HOW}")
    contents = [read_package(path) for path in packages]
    entries, label_names = read_entries(packages[0], contents[0])
    splits: dict[str, list[Item]] = {split: [] for split in SPLITS}
    for path, content in zip(packages, contents, strict=True):
        vendor, drawings = _drawings(path, content)
        for entry in entries:
            label = label_names.index(entry["category"])
            for tone, code in [("", entry["unified"]), *_tones(entry)]:
                if image := drawings.get(code.lower()):
                    item = drawing(f"{vendor} {code}", image, label, _wordings(entry, tone, vendor))
                    splits[split_of(entry["unified"])].append(item)
    preprocessing = "adm" if options.preprocessing == "none" else options.preprocessing
    options = dataclasses.replace(options, image_size=(64, 64), preprocessing=preprocessing)
    return pack_as("emoji_text", f"emoji_text:{argument}", splits, label_names, options)


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


def read_entries(path: Path, content: dict[str, bytes]) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """Reads emoji.json of a package's content. Returns its entries and the names of their categories."""
    try:
        entries = json.loads(content["emoji.json"])
        return entries, tuple(sorted({entry["category"] for entry in entries}))
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not a package emoji-datasource-VENDOR ({error!r}); {HOW}") from None


def drawing(name: str, content: bytes, label: int, captions: tuple[str, ...] = ()) -> Item:
    """Wraps an image file that is already in memory."""
    return Item(name, label, lambda: content, str(zlib.crc32(content)), captions)


def read_package(path: Path) -> dict[str, bytes]:
    """Reads emoji.json and the drawings of a package (tgz), by their path inside it."""
    content = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = member.name.removeprefix("package/")
                if _WANTED.fullmatch(name) and member.isreg() and member.size <= MAX_MEMBER_BYTES:
                    content[name] = archive.extractfile(member).read()  # type: ignore[union-attr]
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"emoji64: {path} is not a complete tarball ({error}); {HOW}") from None
    return content
