"""emoji64: the 3,786 64x64 emoji of npm's emoji-datasource-google, in 10 categories.

The drawings are Google's Noto Emoji (Apache License 2.0); the package is under the MIT licence. A hash of an emoji's
code points assigns it, with all of its skin-tone variants, to a split.
"""

import dataclasses
import json
import re
import tarfile
import zlib
from pathlib import Path

from tarflow_jax.data.packed import MANIFEST, open_packed, pack
from tarflow_jax.data.source import SPLITS, EncodedSource, Item, Options, split_of
from tarflow_jax.errors import UserError

HOW = "get it with: npm pack emoji-datasource-google@16.0.0"
IMAGES = "img/google/64/"
MAX_MEMBER_BYTES = 16 * 2**20
_WANTED = re.compile(r"emoji\.json|img/\w+/64/[^/]+\.png|assets/[^/]+\.webp")


def open_emoji(argument: str, split: str, options: Options) -> EncodedSource:
    """Opens one split of the packed set; raises FileNotFoundError if it has not been packed."""
    folder = options.data_dir / "emoji64"
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(
            f"emoji64: not found in {folder}; {HOW}, "
            "then python -m launch.prepare_data --data=emoji64:emoji-datasource-google-16.0.0.tgz"
        )
    return open_packed(str(folder), split, options, "emoji64")


def prepare_emoji(argument: str, options: Options) -> str:
    """Packs the set from the package at the path `argument`, if given. Returns the name to open it by."""
    if not argument:
        return "emoji64"
    path = Path(argument).expanduser()
    content = read_package(path)
    try:
        entries = json.loads(content["emoji.json"])
        label_names = tuple(sorted({entry["category"] for entry in entries}))
        splits: dict[str, list[Item]] = {split: [] for split in SPLITS}
        for entry in entries:
            variants = (entry, *entry.get("skin_variations", {}).values())
            label = label_names.index(entry["category"])
            names = [variant["image"] for variant in variants if variant["has_img_google"]]
            splits[split_of(entry["unified"])] += [drawing(name, content[IMAGES + name], label) for name in names]
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"emoji64: {path} is not the package emoji-datasource-google ({error!r}); {HOW}") from None
    options = dataclasses.replace(options, image_size=(64, 64))
    pack("emoji64", splits, label_names, options.data_dir / "emoji64", options)
    return "emoji64"


def drawing(name: str, content: bytes, label: int, captions: tuple[str, ...] = ()) -> Item:
    """Wraps an image file that is already in memory."""
    return Item(name, label, lambda: content, str(zlib.crc32(content)), captions)


def read_package(path: Path) -> dict[str, bytes]:
    """Reads emoji.json and the drawings of a package, a tarball or a folder, by their path inside it."""
    if path.is_dir():
        root = path / "package" if (path / "package").is_dir() else path
        files = (file for file in root.rglob("*") if _WANTED.fullmatch(file.relative_to(root).as_posix()))
        return {file.relative_to(root).as_posix(): file.read_bytes() for file in files if file.is_file()}
    if not path.is_file():
        raise FileNotFoundError(f"emoji64: {path} not found; {HOW}")
    content = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = member.name.removeprefix("package/")
                if _WANTED.fullmatch(name) and member.isreg() and member.size <= MAX_MEMBER_BYTES:
                    content[name] = archive.extractfile(member).read()  # type: ignore[union-attr]
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"emoji64: {path} is no whole tarball ({error}); {HOW}") from None
    return content
