"""Data sets by name: `KIND` or `KIND:ARGUMENT`."""

import dataclasses
import difflib
import os
from collections.abc import Callable
from pathlib import Path

from etils import epath

from tarflow_jax.data.emoji import open_emoji, prepare_emoji
from tarflow_jax.data.fashion_mnist import open_fashion_mnist
from tarflow_jax.data.folder import open_folder
from tarflow_jax.data.images import check_preprocessing
from tarflow_jax.data.npz import open_npz
from tarflow_jax.data.packed import open_packed, prepare_folder
from tarflow_jax.data.source import CachedSource, ImageSource, Options
from tarflow_jax.data.splits import SPLITS
from tarflow_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of set: how its name is written, how it is opened and, where it must be, prepared."""

    pattern: str
    open: Callable[[str, str, Options], ImageSource]  # of (argument, split, options)
    prepare: Callable[[str, Options], str] | None = None  # returns the name to train by
    preprocesses: bool = False  # else its images come as they are


def _open_digits(argument: str, split: str, options: Options) -> ImageSource:
    from tarflow_jax.data.digits import open_digits  # importing TFDS takes a second

    return open_digits(split, options.data_dir)


def _open_tfds(argument: str, split: str, options: Options) -> ImageSource:
    from tarflow_jax.data.tfds import open_tfds

    return open_tfds(argument, split, options)


def _prepare_tfds(argument: str, options: Options) -> str:
    from tarflow_jax.data.tfds import prepare_tfds

    return prepare_tfds(argument, options.data_dir)


# To add a set, add a line; see docs/data.md.
KINDS = {
    "digits": Kind("digits", _open_digits),
    "emoji64": Kind("emoji64", open_emoji, prepare_emoji, preprocesses=True),
    "fashion_mnist": Kind("fashion_mnist[:FOLDER]", open_fashion_mnist),
    "folder": Kind("folder:PATH", open_folder, prepare_folder, preprocesses=True),
    "npz": Kind("npz:FILE", open_npz),
    "packed": Kind("packed:FOLDER", open_packed, preprocesses=True),
    "tfds": Kind("tfds:NAME[/CONFIG][:VERSION]", _open_tfds, _prepare_tfds, preprocesses=True),
}


def data_folder(data_dir: str | Path | None) -> Path:
    """A folder of prepared data sets as a user gives it, "~" being theirs; None or "" means `default_data_dir()`."""
    return Path(data_dir).expanduser() if data_dir else default_data_dir()


def default_data_dir() -> Path:
    """Where prepared data sets are kept: $TARFLOW_DATA_DIR, or else ~/.cache/tarflow_jax."""
    return Path(os.environ.get("TARFLOW_DATA_DIR") or "~/.cache/tarflow_jax").expanduser()


def open_source(
    name: str,
    split: str,
    *,
    image_size: tuple[int, int] | None = None,
    preprocessing: str = "none",
    data_dir: epath.PathLike | None = None,
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
    kind, argument, options = _resolve(name, image_size, preprocessing, data_dir, skip_bad)
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r} of {name}; expected one of {', '.join(SPLITS)}")
    source = kind.open(argument, split, options)
    if options.image_size not in (None, source.image_shape[:2]):
        found, wanted = ("x".join(map(str, size)) for size in (source.image_shape[:2], options.image_size))
        raise UserError(f"{name}: its images are {found}, but {wanted} is asked for")
    return CachedSource(source, cache_bytes) if cache_bytes else source


def prepare_source(
    name: str,
    *,
    image_size: tuple[int, int] | None = None,
    preprocessing: str = "none",
    data_dir: epath.PathLike | None = None,
    skip_bad: bool = False,
) -> str:
    """Prepares a data set once: downloads a TFDS set, packs a folder or the emoji. Arguments as `open_source`.

    Returns the name to open it by. Raises ValueError or FileNotFoundError as `open_source` does.
    """
    kind, argument, options = _resolve(name, image_size, preprocessing, data_dir, skip_bad)
    return kind.prepare(argument, options) if kind.prepare else name


def _resolve(
    name: str, image_size: tuple[int, int] | None, preprocessing: str, data_dir: epath.PathLike | None, skip_bad: bool
) -> tuple[Kind, str, Options]:
    """The kind and the argument that a name names, and the options, all checked."""
    key, _, argument = name.partition(":")
    if key not in KINDS:
        known = ", ".join(kind.pattern for kind in KINDS.values())
        close = difflib.get_close_matches(key, KINDS, n=1)
        hint = f"; did you mean {KINDS[close[0]].pattern}?" if close else ""
        raise UserError(f"unknown data set {name!r}; known are {known}{hint}")
    kind = KINDS[key]
    if not argument and kind.pattern.startswith(f"{key}:"):
        raise UserError(f"data set {name!r} is incomplete; expected {kind.pattern}")
    check_preprocessing(preprocessing)
    if preprocessing != "none" and not kind.preprocesses:
        raise UserError(f"{name}: its images are taken as they are; set preprocessing to none")
    folder = data_folder(data_dir)
    size = None if image_size is None else (int(image_size[0]), int(image_size[1]))
    return kind, argument, Options(folder, size, preprocessing, skip_bad)
