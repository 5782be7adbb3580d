"""Opens image folders: assigns files to splits and labels, and checks that every file decodes."""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tarflow_jax.data.images import decode_image, preprocess, read_file
from tarflow_jax.data.source import NO_LABEL, EncodedSource, Item, OpenOptions, split_of
from tarflow_jax.errors import UserError
from tarflow_jax.files import write_text

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".tif", ".tiff")
SPLIT_FOLDERS = {  # case-insensitive, in order of preference
    "train": ("train", "training"),
    "test": ("test", "testing", "val", "valid", "validation", "dev", "eval"),
}
MAX_LISTED = 20


def list_folder(root: Path, split: str) -> tuple[list[Item], tuple[str, ...]]:
    """Lists the images of a split, sorted by name, and the class names, () for unlabelled images.

    `root` holds one subfolder per class, or images without classes, or folders named `train` and `test` (see
    `SPLIT_FOLDERS`) with either. Without split folders, a hash of its path assigns each image to a split. Ignores
    hidden files and links to folders. Raises UserError if there are no images or the layout is ambiguous.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"folder:{root}: no such folder")
    split_folders = _split_folders(root)
    train, base = split_folders.get("train", root), split_folders.get(split, root)
    paths = sorted(_walk(base))
    names = {path.split("/")[0] if "/" in path else "" for path in (paths if base == train else _walk(train))}
    if "" in names and len(names) > 1:
        raise UserError(f"folder:{train}: images are both beside and inside class folders; move all into classes")
    label_names = tuple(sorted(names - {""}))
    if not split_folders:
        paths = [path for path in paths if split_of(path) == split]
    if not paths:
        raise UserError(f"folder:{root}: no {', '.join(EXTENSIONS)} files for the {split} split")
    captions = _listed_captions(base, {Path(path).parent for path in paths})
    return [_item(root, base, path, label_names, captions) for path in paths], label_names


def _listed_captions(base: Path, folders: Iterable[Path]) -> dict[str, tuple[str, ...]]:
    """Reads captions from each folder's metadata.jsonl (Hugging Face's format), by image path relative to `base`."""
    captions: dict[str, list[str]] = {}
    for folder in folders:
        file = base / folder / "metadata.jsonl"
        for number, line in enumerate(file.read_text().splitlines() if file.is_file() else (), 1):
            try:
                fields = json.loads(line)
                text = fields.get("text", fields.get("caption"))
                texts = [] if text is None else [text] if isinstance(text, str) else list(map(str, text))
                captions.setdefault((folder / fields["file_name"]).as_posix(), []).extend(texts)
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f"{file}, line {number}: expected an object with file_name and text") from None
    return {path: tuple(texts) for path, texts in captions.items()}


def _split_folders(root: Path) -> dict[str, Path]:
    """Returns the folder of each split; {} if no folder is named like a split."""
    names = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    train, test = (
        [name for known in known_names for name in names if name.lower() == known]
        for known_names in SPLIT_FOLDERS.values()
    )
    if not train and not test:
        return {}
    others = [name for name in names if name not in train + test and any(_walk(root / name))]
    if len(train) != 1 or not test or others:
        raise UserError(
            f"folder:{root}: {', '.join(train + test + others)} may be splits or classes; expected train and test (or "
            "val), each with a folder per class, and nothing beside them, or a folder per class, none with such a name"
        )
    return {"train": root / train[0], "test": root / test[0]}


def _walk(root: Path) -> Iterator[str]:
    """Yields the paths of the image files under `root`, relative to it, with forward slashes."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in files:
            if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                yield (Path(folder) / name).relative_to(root).as_posix()


def _item(
    root: Path, base: Path, path: str, label_names: tuple[str, ...], captions: dict[str, tuple[str, ...]]
) -> Item:
    name, file = path.split("/")[0], base / path
    if label_names and name not in label_names:
        raise UserError(f"folder:{base}: class {name!r} of {path} has no folder in the training split")
    label = label_names.index(name) if label_names else NO_LABEL
    try:
        status = file.stat()
        stamp = f"{status.st_size} {status.st_mtime_ns} {status.st_mode}"
    except OSError:
        stamp = "unreadable"
    texts, beside = captions.get(path, ()), file.with_suffix(".txt")
    if beside.is_file():
        texts += tuple(line.strip() for line in beside.read_text(errors="replace").splitlines() if line.strip())
    return Item(file.relative_to(root).as_posix(), label, lambda: read_file(file), stamp, texts)


def open_folder(argument: str, split: str, options: OpenOptions) -> EncodedSource:
    """Opens one split of an image folder, after checking that every file decodes.

    Caches the result of the check under the data folder until a file changes. Raises UserError with a list of the bad
    files, or with `skip_bad` leaves them out and logs their number.
    """
    root, preprocessing = Path(argument).expanduser(), options.preprocessing
    name = f"folder:{root}"
    items, label_names = list_folder(root, split)
    if options.image_size is None and preprocessing != "none":
        raise UserError(f"{name}: preprocessing {preprocessing} needs an image size")
    first_shape, bits = first_image(name, items)
    size = options.image_size or first_shape[:2]
    shape = (*size, first_shape[2])
    key = hash_items(items, str(root.resolve()), size if preprocessing == "none" else None)
    report = options.data_dir / "checked" / f"{key[:32]}.json"
    try:
        checked = json.loads(report.read_text())
        bad, content = checked["bad"], checked["content"]
    except (OSError, ValueError, TypeError, KeyError):
        bad, content = check_items(items, preprocessing, shape, bits)
        write_text(report, json.dumps({"content": content, "bad": bad}, indent=1) + "\n")
    refuse_bad(name, bad, len(items), options.skip_bad)
    items = [item for item in items if item.name not in bad]
    source = EncodedSource(
        name,
        len(items),
        items.__getitem__,
        options,
        content=content,
        image_shape=shape,
        bits=bits,
        label_names=label_names,
    )
    if any(item.captions for item in items):
        source.captions = [item.captions for item in items]
    return source


def first_image(name: str, items: list[Item]) -> tuple[tuple[int, int, int], int]:
    """Returns the shape (H, W, K) and bits per channel of the first image that decodes; K is 3 for 8 bits."""
    for item in items:
        try:
            image = decode_image(item.read(), None, bits=None)
        except ValueError:
            continue
        return (image.shape, 16) if isinstance(image, np.ndarray) else ((image.height, image.width, 3), 8)
    raise UserError(f"{name}: none of the {len(items)} files is an image")


def hash_items(items: Iterable[Item], *more: object) -> str:
    """Returns the SHA-256 of the items' names, labels, stamps and captions, and of any other values."""
    digest = hashlib.sha256(repr(more).encode())
    for item in items:
        stamp = item.stamp + repr(item.captions) * bool(item.captions)
        digest.update(f"{item.name}\0{item.label}\0{stamp}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def check_items(items: list[Item], preprocessing: str, shape: tuple[int, ...], bits: int) -> tuple[dict[str, str], str]:
    """Reads and decodes every item in parallel.

    Returns the reason for each unusable item, by name, and the SHA-256 of the labels and files of the others.
    """

    def checked(item: Item) -> str | bytes:
        try:
            content = item.read()
            image = decode_image(content, shape[2], bits=bits)
            if preprocessing == "none":
                preprocess(image, preprocessing, (shape[0], shape[1]))
        except ValueError as error:
            return str(error)
        return hashlib.sha256(content).digest()

    bad, digest = {}, hashlib.sha256()
    with ThreadPool() as pool:
        outcomes = pool.imap(checked, items, chunksize=16)
        outcomes = tqdm(outcomes, "checking images", len(items), disable=len(items) <= 1024)
        for item, outcome in zip(items, outcomes, strict=True):
            if isinstance(outcome, str):
                bad[item.name] = outcome
            else:
                digest.update(f"{item.label} ".encode() + outcome)
    return bad, digest.hexdigest()


def refuse_bad(name: str, bad: dict[str, str], num_images: int, skip_bad: bool) -> None:
    """Raises UserError with a list of the bad files, or logs their number if they may be skipped."""
    if not bad:
        return
    if not skip_bad:
        listed = "; ".join(f"{path} ({reason})" for path, reason in list(bad.items())[:MAX_LISTED])
        more = f"; and {len(bad) - MAX_LISTED} more" if len(bad) > MAX_LISTED else ""
        advice = "fix or remove them, or set skip_bad"
        raise UserError(f"{name}: {len(bad)} of {num_images} files cannot be used; {advice}: {listed}{more}")
    logging.getLogger(__name__).warning("%s: skipping %d of %d files as bad", name, len(bad), num_images)
