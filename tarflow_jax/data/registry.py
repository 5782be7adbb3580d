"""Opens and prepares data sets by name: `KIND` or `KIND:ARGUMENT`."""

import contextlib
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from tarflow_jax.data.arrays import open_digits, open_fashion_mnist, open_npz
from tarflow_jax.data.emoji import open_emoji, prepare_emoji, prepare_emoji_text
from tarflow_jax.data.folder import open_folder
from tarflow_jax.data.images import PREPROCESSINGS
from tarflow_jax.data.latents import open_latents
from tarflow_jax.data.packed import open_packed, prepare_folder
from tarflow_jax.data.sequences import KIND
from tarflow_jax.data.source import SPLITS, ImageSource, OpenOptions
from tarflow_jax.data.tfds import open_tfds, prepare_tfds
from tarflow_jax.errors import UserError


class Kind(NamedTuple):
    """A kind of data set: how its name is written, opened and, where necessary, prepared."""

    pattern: str
    open: Callable[[str, str, OpenOptions], ImageSource] | None  # of (argument, split, options); None: packed:FOLDER
    prepare: Callable[[str, OpenOptions], str] | None = None  # returns the name to open it by


# To add a set, add a line; see docs/howto/data.md.
KINDS = {
    "digits": Kind("digits", open_digits),
    "emoji64": Kind("emoji64", open_emoji, prepare_emoji),
    "emoji_text": Kind("emoji_text:FOLDER", None, prepare_emoji_text),
    "fashion_mnist": Kind("fashion_mnist[:FOLDER]", open_fashion_mnist),
    "folder": Kind("folder:PATH", open_folder, prepare_folder),
    "latents": Kind("latents:FOLDER", open_latents),
    "npz": Kind("npz:FILE", open_npz),
    "packed": Kind("packed:FOLDER", open_packed),
    "tfds": Kind("tfds:NAME[/CONFIG][:VERSION]", open_tfds, prepare_tfds),
}


def data_folder(data_dir: epath.PathLike | None = None) -> Path:
    """Returns the folder of prepared data sets: `data_dir`, else $TARFLOW_DATA_DIR, else ~/.cache/tarflow_jax."""
    return Path(data_dir or os.environ.get("TARFLOW_DATA_DIR") or "~/.cache/tarflow_jax").expanduser()


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
      name: see `KINDS` and docs/howto/data.md.
      split: "train" or "test".
      image_size: (H, W) to resize to; None keeps the set's own size.
      preprocessing: how to resize: "none", "tarflow" or "adm"; see `images.preprocess`.
      data_dir: folder of prepared data sets; see `data_folder` for the default.
      skip_bad: skip a folder's bad files instead of raising.
      cache_bytes: memory for decoded images, which are kept once read; 0 keeps none.

    Raises:
      UserError: unknown name, split or preprocessing, images of another size, or a damaged file.
      FileNotFoundError: the data are missing; the message says how to get them.
    """
    # Every shard stays open, and ImageNet's thousand do not fit into the usual limit of 1,024 open files.
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS allows less than it reports
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    options = OpenOptions(data_folder(data_dir), image_size, preprocessing, skip_bad, cache_bytes)
    kind, argument = _find(name, options)
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r} of {name}; expected one of {', '.join(SPLITS)}")
    if kind.open is None:
        raise UserError(f"{name}: prepare it with launch.prepare_data, and open it by the name packed:… that it prints")
    source = kind.open(argument, split, options)
    if preprocessing not in ("none", source.preprocessing):
        raise UserError(f"{name}: its images are not resized; set preprocessing to none")
    if image_size not in (None, source.image_shape[:2]):
        stored, wanted = ("x".join(map(str, size)) for size in (source.image_shape[:2], image_size))
        raise UserError(f"{name}: its images are {stored}, but {wanted} is asked for")
    return source


def prepare_source(name: str, *, data_dir: epath.PathLike | None = None, **how: Any) -> str:
    """Prepares a data set unless that has been done: downloads a TFDS set, or packs images.

    Takes the keywords of `open_source` and raises the same errors. Returns the name to open the set by.
    """
    options = OpenOptions(data_folder(data_dir), **how)
    kind, argument = _find(name, options)
    return kind.prepare(argument, options) if kind.prepare else name


def _find(name: str, options: OpenOptions) -> tuple[Kind, str]:
    """Splits a name into its kind and argument; checks both, and the preprocessing."""
    if name.startswith(KIND):
        raise UserError(f"{name} holds arrays; expected a data set of images")
    key, _, argument = name.partition(":")
    if key not in KINDS:
        known = ", ".join(kind.pattern for kind in KINDS.values())
        raise UserError(f"unknown data set {name!r}; expected one of {known}")
    kind = KINDS[key]
    if not argument and kind.pattern.startswith(f"{key}:"):
        raise UserError(f"data set {name!r} is incomplete; expected {kind.pattern}")
    if options.preprocessing not in PREPROCESSINGS:
        raise UserError(f"unknown preprocessing {options.preprocessing!r}; expected one of {', '.join(PREPROCESSINGS)}")
    return kind, argument
