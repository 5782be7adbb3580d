"""Data sets by name."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from pathlib import Path

from tarflow_jax.data.source import ImageSource

SPLITS = ("train", "test")


def _digits(argument: str, split: str, data_dir: Path) -> ImageSource:
    from tarflow_jax.data.digits import open_digits

    return open_digits(split, data_dir)


def _fashion_mnist(argument: str, split: str, data_dir: Path) -> ImageSource:
    from tarflow_jax.data.fashion_mnist import open_fashion_mnist

    return open_fashion_mnist(split, Path(argument) if argument else None)


# name -> opener(argument, split, data_dir): "name" or "name:argument" opens it. See docs/data.md, "Adding a source".
SOURCES: dict[str, Callable[[str, str, Path], ImageSource]] = {
    "digits": _digits,
    "fashion_mnist": _fashion_mnist,
}


def default_data_dir() -> Path:
    """Where prepared data sets are kept: $TARFLOW_DATA_DIR, or else ~/.cache/tarflow_jax."""
    return Path(os.environ.get("TARFLOW_DATA_DIR") or "~/.cache/tarflow_jax").expanduser()


def open_source(name: str, split: str, *, data_dir: str | os.PathLike[str] | None = None) -> ImageSource:
    """Opens one split of a data set.

    Args:
      name: `digits` or `fashion_mnist[:FOLDER]`.
      split: "train" or "test".
      data_dir: where prepared data sets are kept; None means `default_data_dir()`.

    Raises:
      ValueError: the name or the split is unknown, or a file is not what it should be.
      FileNotFoundError: the data are not where they should be; the message says how to get them.
    """
    kind, _, argument = name.partition(":")
    if kind not in SOURCES:
        close = difflib.get_close_matches(kind, SOURCES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown data set {name!r}; known are {', '.join(sorted(SOURCES))}{hint}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r} of {name}; expected one of {', '.join(SPLITS)}")
    folder = default_data_dir() if data_dir is None else Path(data_dir).expanduser()
    return SOURCES[kind](argument, split, folder)
