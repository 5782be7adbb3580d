"""Data sets by name: `KIND` or `KIND:ARGUMENT`."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tarflow_jax.data.emoji import emoji_folder, list_emoji, not_prepared
from tarflow_jax.data.folder import list_folder, open_folder
from tarflow_jax.data.images import check_preprocessing
from tarflow_jax.data.npz import open_npz
from tarflow_jax.data.packed import MANIFEST, open_packed, pack
from tarflow_jax.data.source import CachedSource, ImageSource
from tarflow_jax.data.splits import SPLITS
from tarflow_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Options:
    """How to open or prepare a set; see `open_source`."""

    data_dir: Path
    image_size: tuple[int, int] | None = None
    preprocessing: str = "none"
    skip_bad: bool = False


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of set: how its name is written, how it is opened and, where it must be, prepared."""

    pattern: str
    open: Callable[[str, str, Options], ImageSource]
    prepare: Callable[[str, Options], str] | None = None  # returns the name to train by
    preprocesses: bool = False  # else its images come as they are


def _open_digits(argument: str, split: str, options: Options) -> ImageSource:
    from tarflow_jax.data.digits import open_digits  # importing TFDS takes a second

    return open_digits(split, options.data_dir)


def _open_fashion_mnist(argument: str, split: str, options: Options) -> ImageSource:
    from tarflow_jax.data.fashion_mnist import open_fashion_mnist

    return open_fashion_mnist(split, Path(argument).expanduser() if argument else None)


def _open_tfds(argument: str, split: str, options: Options) -> ImageSource:
    from tarflow_jax.data.tfds import open_tfds

    size, preprocessing = options.image_size, options.preprocessing
    return open_tfds(argument, split, options.data_dir, image_size=size, preprocessing=preprocessing)


def _prepare_tfds(argument: str, options: Options) -> str:
    from tarflow_jax.data.tfds import prepare_tfds

    prepare_tfds(argument, options.data_dir)
    return f"tfds:{argument}"


def _open_folder(argument: str, split: str, options: Options) -> ImageSource:
    return open_folder(
        Path(argument).expanduser(),
        split,
        options.data_dir,
        image_size=options.image_size,
        preprocessing=options.preprocessing,
        skip_bad=options.skip_bad,
    )


def _prepare_folder(argument: str, options: Options) -> str:
    root = Path(argument).expanduser()
    listings = {split: list_folder(root, split) for split in SPLITS}
    if options.image_size is None:
        raise UserError(f"folder:{root}: packing needs an image size; give one")
    height, width = options.image_size
    output = options.data_dir / "packed" / f"{root.resolve().name}-{height}x{width}-{options.preprocessing}"
    items = {split: listing.items for split, listing in listings.items()}
    _pack(f"folder:{root}", items, listings["train"].label_names, output, options)
    return f"packed:{output}"


def _pack(name: str, splits: Any, label_names: tuple[str, ...], output: Path, options: Options) -> None:
    assert options.image_size is not None
    pack(
        name,
        splits,
        label_names,
        output,
        image_size=options.image_size,
        preprocessing=options.preprocessing,
        skip_bad=options.skip_bad,
        progress=True,
    )


def _open_packed(argument: str, split: str, options: Options) -> ImageSource:
    return open_packed(f"packed:{argument}", Path(argument).expanduser(), split, options.preprocessing)


def _open_emoji(argument: str, split: str, options: Options) -> ImageSource:
    folder = emoji_folder(options.data_dir)
    if not (folder / MANIFEST).is_file():
        raise not_prepared(options.data_dir)
    return open_packed("emoji64", folder, split, options.preprocessing)


def _prepare_emoji(argument: str, options: Options) -> str:
    if not argument:
        raise not_prepared(options.data_dir)
    splits, label_names = list_emoji(Path(argument).expanduser())
    options = dataclasses.replace(options, image_size=(64, 64))
    _pack("emoji64", splits, label_names, emoji_folder(options.data_dir), options)
    return "emoji64"


def _open_npz(argument: str, split: str, options: Options) -> ImageSource:
    return open_npz(Path(argument).expanduser(), split)


# To add a set, add a line; see docs/data.md.
KINDS = {
    "digits": Kind("digits", _open_digits),
    "emoji64": Kind("emoji64", _open_emoji, _prepare_emoji, preprocesses=True),
    "fashion_mnist": Kind("fashion_mnist[:FOLDER]", _open_fashion_mnist),
    "folder": Kind("folder:PATH", _open_folder, _prepare_folder, preprocesses=True),
    "npz": Kind("npz:FILE", _open_npz),
    "packed": Kind("packed:FOLDER", _open_packed, preprocesses=True),
    "tfds": Kind("tfds:NAME[/CONFIG][:VERSION]", _open_tfds, _prepare_tfds, preprocesses=True),
}


def default_data_dir() -> Path:
    """Where prepared data sets are kept: $TARFLOW_DATA_DIR, or else ~/.cache/tarflow_jax."""
    return Path(os.environ.get("TARFLOW_DATA_DIR") or "~/.cache/tarflow_jax").expanduser()


def open_source(
    name: str,
    split: str,
    *,
    image_size: tuple[int, int] | None = None,
    preprocessing: str = "none",
    data_dir: str | os.PathLike[str] | None = None,
    skip_bad: bool = False,
    cache_bytes: int = 0,
) -> ImageSource:
    """Opens one split of a data set.

    Args:
      name: see `KINDS`, and docs/data.md.
      split: "train" or "test".
      image_size: (H, W) to bring the images to; None means the size they have.
      preprocessing: how: "none", "tarflow" or "adm"; see `images.preprocess`.
      data_dir: where prepared data sets are kept; None or "" means `default_data_dir()`.
      skip_bad: leave out bad files of a folder instead of raising.
      cache_bytes: keep decoded images in memory, as many as fit into this.

    Raises:
      ValueError: the name, the split or the preprocessing is unknown, the images have another size, or a file
        is not what it should be.
      FileNotFoundError: the data are not where they should be; the message says how to get them.
    """
    kind, argument = _find_kind(name)
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r} of {name}; expected one of {', '.join(SPLITS)}")
    options = _options(name, kind, image_size, preprocessing, data_dir, skip_bad)
    source = kind.open(argument, split, options)
    if options.image_size not in (None, source.image_shape[:2]):
        height, width = source.image_shape[:2]
        raise UserError(f"{name}: its images are {height}x{width}, but {_size(image_size)} is asked for")
    return CachedSource(source, cache_bytes) if cache_bytes else source


def prepare_source(
    name: str,
    *,
    image_size: tuple[int, int] | None = None,
    preprocessing: str = "none",
    data_dir: str | os.PathLike[str] | None = None,
    skip_bad: bool = False,
) -> str:
    """Prepares a data set once: downloads a TFDS set, packs a folder or the emoji. Arguments as `open_source`.

    Returns the name to open it by. Raises ValueError or FileNotFoundError as `open_source` does.
    """
    kind, argument = _find_kind(name)
    options = _options(name, kind, image_size, preprocessing, data_dir, skip_bad)
    return kind.prepare(argument, options) if kind.prepare else name


def _find_kind(name: str) -> tuple[Kind, str]:
    key, _, argument = name.partition(":")
    if key not in KINDS:
        known = ", ".join(kind.pattern for kind in KINDS.values())
        close = difflib.get_close_matches(key, KINDS, n=1)
        hint = f"; did you mean {KINDS[close[0]].pattern}?" if close else ""
        raise UserError(f"unknown data set {name!r}; known are {known}{hint}")
    pattern = KINDS[key].pattern
    if not argument and pattern.startswith(f"{key}:"):
        raise UserError(f"data set {name!r} is incomplete; expected {pattern}")
    return KINDS[key], argument


def _options(
    name: str,
    kind: Kind,
    image_size: tuple[int, int] | None,
    preprocessing: str,
    data_dir: str | os.PathLike[str] | None,
    skip_bad: bool,
) -> Options:
    check_preprocessing(preprocessing)
    if preprocessing != "none" and not kind.preprocesses:
        raise UserError(f"{name}: its images are taken as they are; set preprocessing to none")
    folder = Path(data_dir).expanduser() if data_dir else default_data_dir()
    size = None if image_size is None else (int(image_size[0]), int(image_size[1]))
    return Options(folder, size, preprocessing, skip_bad)


def _size(size: tuple[int, int] | None) -> str:
    return "x".join(map(str, size or ()))
