"""Image folders: which files belong to a split, with which label, and which of them are bad."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from tarflow_jax.data.images import decode_image, preprocess, read_file
from tarflow_jax.data.source import NO_LABEL, EncodedSource, Options, count_labels
from tarflow_jax.data.splits import split_of
from tarflow_jax.errors import UserError
from tarflow_jax.files import write_text

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".gif")
SPLIT_FOLDERS = {  # in any case; the first one that is there
    "train": ("train", "training"),
    "test": ("test", "testing", "val", "valid", "validation", "dev", "eval"),
}
MAX_LISTED = 20


class Item(NamedTuple):
    """An encoded image that can be read: its name in the set, its label, and how to read its bytes."""

    name: str
    label: int
    read: Callable[[], bytes]
    stamp: str  # changes when the image does


def list_folder(root: Path, split: str) -> tuple[list[Item], tuple[str, ...]]:
    """The images under `root` that belong to a split, sorted by name, and the names of the classes, () without any.

    `root` holds one subfolder a class, or images without classes; or folders `train` and `test` (or another name of
    `SPLIT_FOLDERS`, in any case) that do. Without these two, a tenth of the images is the test split, by a hash of
    their path. Links to folders are not followed; files whose name does not end like an image's are not looked at.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: there are no images, images are both beside and inside class folders, or it cannot be told whether
        folders are splits or classes.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"folder:{root}: no such folder")
    if splits := _splits(root):
        label_names = _classes(_walk(splits["train"]), splits["train"])
        chosen = splits[split]
        paths = sorted(_walk(chosen))
    else:
        chosen, paths = root, sorted(_walk(root))
        label_names = _classes(paths, root)
        paths = [path for path in paths if split_of(path) == split]
    if not paths:
        raise UserError(f"folder:{root}: no {', '.join(EXTENSIONS)} files for the {split} split")
    return [_item(root, chosen, path, label_names) for path in paths], label_names


def _splits(root: Path) -> dict[str, Path]:
    """The folders of the splits; {} where no folder is named like one."""
    names = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    found: dict[str, list[str]] = {
        split: [name for known in SPLIT_FOLDERS[split] for name in names if name.lower() == known]
        for split in SPLIT_FOLDERS
    }
    named = [*found["train"], *found["test"]]
    others = [name for name in names if name not in named and any(_walk(root / name))]
    twice = len({name.lower() for name in named}) < len(named)
    if named and (len(found["train"]) != 1 or not found["test"] or others or twice):
        raise UserError(
            f"folder:{root}: {', '.join(named + others)} may be splits or classes; expected train and test (or val), "
            "each with a folder a class, and nothing beside them, or a folder a class, none with such a name"
        )
    return {split: root / of_split[0] for split, of_split in found.items() if of_split}


def _walk(root: Path) -> Iterator[str]:
    """Paths of the image files under `root`, relative to it, with forward slashes."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in files:
            if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                yield (Path(folder) / name).relative_to(root).as_posix()


def _classes(paths: Iterable[str], root: Path) -> tuple[str, ...]:
    names = {path.split("/")[0] if "/" in path else "" for path in paths}
    if "" in names and len(names) > 1:
        raise UserError(f"folder:{root}: images are both beside and inside class folders; move the former into a class")
    return tuple(sorted(names - {""}))


def _item(root: Path, chosen: Path, path: str, label_names: tuple[str, ...]) -> Item:
    label = NO_LABEL
    if label_names:
        name = path.split("/")[0]
        if name not in label_names:
            raise UserError(f"folder:{chosen}: class {name!r} of {path} has no folder in the training split")
        label = label_names.index(name)
    file = chosen / path
    try:
        status = file.stat()
        stamp = f"{status.st_size} {status.st_mtime_ns} {status.st_mode}"
    except OSError:
        stamp = "unreadable"
    return Item(file.relative_to(root).as_posix(), label, lambda: read_file(file), stamp)


def open_folder(argument: str, split: str, options: Options) -> EncodedSource:
    """Opens one split of an image folder, once every file of it has been seen to decode.

    The outcome of that check is kept under the data folder until a file changes. Raises ValueError with a list of the
    bad files, unless `skip_bad`: then they are left out, and their number is logged.
    """
    root, image_size, preprocessing = Path(argument).expanduser(), options.image_size, options.preprocessing
    name = f"folder:{root}"
    items, label_names = list_folder(root, split)
    if image_size is None and preprocessing != "none":
        raise UserError(f"{name}: preprocessing {preprocessing} needs an image size")
    size = image_size or _first_size(name, items)
    key = fingerprint(items, str(root.resolve()), size if preprocessing == "none" else None)
    report = options.data_dir / "checked" / f"{key[:32]}.json"
    try:
        bad = dict(json.loads(report.read_text()))
    except (OSError, ValueError, TypeError):
        bad = find_bad(items, preprocessing, size)
        write_text(report, json.dumps(bad, indent=1) + "\n")
    refuse_bad(name, bad, len(items), options.skip_bad)
    items = [item for item in items if item.name not in bad]
    return EncodedSource(
        name,
        len(items),
        lambda index: (items[index].read(), items[index].label),
        lambda index: f"{name}: {items[index].name}",
        content=repr([(item.name, item.label, item.stamp.split()[0]) for item in items]),  # with the size, no times
        image_shape=(*size, 3),
        preprocessing=preprocessing,
        num_classes=len(label_names),
        label_names=label_names,
        class_counts=lambda: count_labels([item.label for item in items], len(label_names)),
    )


def _first_size(name: str, items: list[Item]) -> tuple[int, int]:
    """(H, W) of the first image that decodes."""
    for item in items:
        try:
            image = decode_image(item.read())
        except ValueError:
            continue
        return image.height, image.width
    raise UserError(f"{name}: none of the {len(items)} files is an image")


def fingerprint(items: Iterable[Item], *more: object) -> str:
    """A hash that changes with the items' names, labels and stamps, and with anything else given."""
    digest = hashlib.sha256(repr(more).encode())
    for item in items:
        digest.update(f"{item.name}\0{item.label}\0{item.stamp}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def find_bad(items: list[Item], preprocessing: str, image_size: tuple[int, int]) -> dict[str, str]:
    """Reads and decodes every item; what is wrong with each that cannot be used, by name."""

    def problem(item: Item) -> str | None:
        try:
            image = decode_image(item.read())
            if preprocessing == "none":
                preprocess(image, preprocessing, image_size)
        except ValueError as error:
            return str(error)
        return None

    bad: dict[str, str] = {}
    # A chunk at a time: the pool would otherwise queue millions of calls at once.
    chunks = [items[start : start + 1024] for start in range(0, len(items), 1024)]
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=len(items), desc="checking images", disable=len(items) <= 1024) as bar,
    ):
        for chunk in chunks:
            found = zip(chunk, pool.map(problem, chunk), strict=True)
            bad.update((item.name, text) for item, text in found if text is not None)
            bar.update(len(chunk))
    return bad


def refuse_bad(name: str, bad: dict[str, str], num_images: int, skip_bad: bool) -> None:
    """Raises ValueError with a list of bad files that may not be skipped; else logs how many there are."""
    if not bad:
        return
    if not skip_bad or len(bad) == num_images:
        listed = [f"{path} ({reason})" for path, reason in list(bad.items())[:MAX_LISTED]]
        if len(bad) > MAX_LISTED:
            listed.append(f"and {len(bad) - MAX_LISTED} more")
        raise UserError(
            f"{name}: {len(bad)} of {num_images} files cannot be used; mend or remove them, or set skip_bad: "
            + "; ".join(listed)
        )
    logging.getLogger(__name__).warning("%s: skipping %d of %d files as bad", name, len(bad), num_images)
