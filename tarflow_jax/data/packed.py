"""Packed sets: preprocessed images as PNG in array_record shards, with a manifest.

A record is the label (int32, little endian) followed by a PNG. The folder is complete once it has a manifest.json;
until then each finished shard has a report beside it, and packing again takes up where it stopped.
"""

import io
import json
import math
import os
import struct
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tqdm import tqdm

from tarflow_jax.data.folder import Item, fingerprint, list_folder, refuse_bad
from tarflow_jax.data.images import BACKGROUND, check_preprocessing, decode_image, preprocess
from tarflow_jax.data.source import EncodedSource, Options
from tarflow_jax.data.splits import SPLITS
from tarflow_jax.errors import UserError
from tarflow_jax.files import sha256, write_text

MANIFEST = "manifest.json"
FORMAT = 1
IMAGES_PER_SHARD = 1024
LABEL = struct.Struct("<i")


def prepare_folder(argument: str, options: Options) -> str:
    """Packs an image folder under the data folder; returns the name to open it by."""
    root = Path(argument).expanduser()
    listings = {split: list_folder(root, split) for split in SPLITS}
    if options.image_size is None:
        raise UserError(f"folder:{root}: packing needs an image size; give one")
    height, width = options.image_size
    output = options.data_dir / "packed" / f"{root.resolve().name}-{height}x{width}-{options.preprocessing}"
    splits, label_names = {split: items for split, (items, _) in listings.items()}, listings["train"][1]
    pack(f"folder:{root}", splits, label_names, output, options.image_size, options.preprocessing, options.skip_bad)
    return f"packed:{output}"


def pack(
    name: str,
    splits: Mapping[str, list[Item]],
    label_names: tuple[str, ...],
    folder: Path,
    image_size: tuple[int, int],
    preprocessing: str,
    skip_bad: bool = False,
) -> None:
    """Packs the images of every split into `folder`, or goes on where an earlier call stopped.

    The manifest says the preprocessing, sizes, label names, and for each split the images, the images of each class,
    and the shards with their SHA-256.

    Args:
      name: of the set, for messages and the manifest.
      splits: split -> images.
      label_names: one name a class; () for unlabelled images.
      folder: where to; made if it is missing.
      image_size: (H, W) of the packed images, which are RGB.
      preprocessing: see `images.preprocess`.
      skip_bad: leave bad files out instead of raising.

    Raises ValueError: files are bad (all are listed), or the folder holds another set, or a packed shard has changed.
    """
    check_preprocessing(preprocessing)
    num_images = sum(map(len, splits.values()))
    parts = [(split, fingerprint(items)) for split, items in splits.items()]
    key = fingerprint([], FORMAT, parts, label_names, image_size, preprocessing)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / MANIFEST).exists():
        _check_packed(name, folder, key)
        return
    reports = {}
    with tqdm(total=num_images, desc=f"packing {name}") as bar, ThreadPoolExecutor(os.cpu_count()) as pool:
        recipe = _Recipe(key, image_size, preprocessing, pool, bar)
        for split, items in splits.items():
            starts = range(0, len(items), IMAGES_PER_SHARD)
            shards = [items[start : start + IMAGES_PER_SHARD] for start in starts]
            paths = [folder / f"{split}-{index:05d}.array_record" for index in range(len(shards))]
            reports[split] = list(map(recipe.pack_shard, paths, shards))
    bad = {path: why for split in reports.values() for report in split for path, why in report["bad"]}
    refuse_bad(name, bad, num_images, skip_bad)
    manifest = {
        "format": FORMAT,
        "name": name,
        "fingerprint": key,
        "image_shape": [*image_size, 3],
        "preprocessing": preprocessing,
        "background": BACKGROUND,
        "label_names": list(label_names),
        "splits": {split: _summary(of_split, len(label_names)) for split, of_split in reports.items()},
    }
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    for report in [report for split in reports.values() for report in split]:
        _report_of(folder / report["file"]).unlink()


def _report_of(shard: Path) -> Path:
    return shard.with_suffix(".json")


class _Recipe(NamedTuple):
    """How to pack any shard of a set."""

    key: str
    image_size: tuple[int, int]
    preprocessing: str
    pool: ThreadPoolExecutor
    bar: tqdm

    def pack_shard(self, path: Path, items: list[Item]) -> dict[str, Any]:
        """Writes one shard, unless its report says that this was done; returns the report."""
        try:
            report = json.loads(_report_of(path).read_text())
            if report["fingerprint"] == self.key and report["sha256"] == sha256(path):
                self.bar.update(len(items))
                return report
        except (OSError, ValueError, TypeError, KeyError):
            pass  # not packed yet, or not wholly
        partial = path.with_name(f".{path.name}.partial")
        try:
            report = {"fingerprint": self.key, "file": path.name, **self._write(partial, items)}
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)  # there only if the disk is full, or the like
        write_text(_report_of(path), json.dumps(report, indent=1) + "\n")
        return report

    def _write(self, path: Path, items: list[Item]) -> dict[str, Any]:
        """Writes the good ones of the items to a new array_record; says what was written."""
        sizes: set[tuple[int, int]] = set()  # (H, W)
        labels: list[int] = []
        bad: list[tuple[str, str]] = []
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for item, (outcome, size) in zip(items, self.pool.map(self._encode, items), strict=True):
            if isinstance(outcome, ValueError):
                bad.append((item.name, str(outcome)))
            else:
                writer.write(LABEL.pack(item.label) + outcome)
                sizes.add(size)
                labels.append(item.label)
            self.bar.update()
        writer.close()
        return {
            "images": len(labels),
            "bytes": path.stat().st_size,
            "sha256": sha256(path),
            "class_counts": np.bincount(np.array(labels, np.int64) + 1, minlength=1)[1:].tolist(),
            "smallest": min(sizes, key=math.prod, default=None),
            "largest": max(sizes, key=math.prod, default=None),
            "bad": bad,
        }

    def _encode(self, item: Item) -> tuple[bytes | ValueError, tuple[int, int]]:
        """The preprocessed image as PNG, or what is wrong with it, and its original (H, W)."""
        try:
            image = decode_image(item.read())
            array = preprocess(image, self.preprocessing, self.image_size)
        except ValueError as error:
            return error, (0, 0)
        file = io.BytesIO()
        # The fastest level: its files are a little larger and decode as fast.
        Image.fromarray(array).save(file, "png", compress_level=1)
        return file.getvalue(), (image.height, image.width)


def _summary(reports: list[dict[str, Any]], num_classes: int) -> dict[str, Any]:
    """What the manifest says of one split."""
    counts = np.zeros(num_classes, np.int64)
    for report in reports:
        counts[: len(report["class_counts"])] += report["class_counts"]
    sizes = [report[which] for report in reports for which in ("smallest", "largest") if report[which]]
    shard_keys = ("file", "images", "bytes", "sha256")
    return {
        "images": sum(report["images"] for report in reports),
        "skipped": sum(len(report["bad"]) for report in reports),
        "class_counts": counts.tolist(),
        "smallest_original": min(sizes, key=math.prod, default=None),
        "largest_original": max(sizes, key=math.prod, default=None),
        "shards": [{key: report[key] for key in shard_keys} for report in reports if report["images"]],
    }


def _check_packed(name: str, folder: Path, key: str) -> None:
    """Compares a folder packed before with what is to be packed, and its shards with their SHA-256."""
    manifest = read_manifest(folder)
    if manifest["fingerprint"] != key:
        raise UserError(
            f"{name}: {folder} holds another set, or this one with other files or preprocessing; "
            "remove it or choose another data_dir"
        )
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            if sha256(folder / shard["file"]) != shard["sha256"]:
                raise UserError(f"{folder / shard['file']}: changed since it was packed; remove {folder}")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a packed set; FileNotFoundError without one, ValueError where it is damaged."""
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} is not a packed set, it has no {MANIFEST}; pack one with "
            "python -m launch.prepare_data --data=folder:PATH"
        )
    try:
        manifest = json.loads(path.read_text())
        height, width, channels = manifest["image_shape"]
        names, splits = manifest["label_names"], manifest["splits"]
        files = [shard["file"] for split in splits.values() for shard in split["shards"]]
        sizes = [shard["bytes"] for split in splits.values() for shard in split["shards"]]
        whole = all(type(size) is int and size > 0 for size in (height, width, *sizes)) and channels == 3
        plain = all(type(name) is str for name in names) and all(Path(file).name == file for file in files)
        all_counts = [split["class_counts"] for split in splits.values()]
        counted = all(
            len(counts) == len(names) and all(type(count) is int and count >= 0 for count in counts)
            for counts in all_counts
        )
        if manifest["format"] != FORMAT or not whole or not plain or not counted:
            raise UserError("unexpected values")
        check_preprocessing(manifest["preprocessing"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: damaged or from another version ({error}); pack the set again") from None
    return manifest


def open_packed(argument: str, split: str, options: Options, name: str | None = None) -> EncodedSource:
    """Opens one split of the packed set in the folder `argument`; `name` is for messages, "packed:FOLDER" if None.

    Raises FileNotFoundError where there is none, and ValueError where shards are missing or truncated, or
    where it was packed with another preprocessing than the one asked for; "none" takes them as they are.
    """
    folder, preprocessing, name = Path(argument).expanduser(), options.preprocessing, name or f"packed:{argument}"
    manifest = read_manifest(folder)
    if preprocessing not in ("none", manifest["preprocessing"]):
        raise UserError(
            f"{name}: packed with preprocessing {manifest['preprocessing']}, not {preprocessing}; pack it again"
        )
    if split not in manifest["splits"]:
        raise UserError(f"{name}: has no {split} split")
    shards = manifest["splits"][split]["shards"]
    for shard in shards:
        path = folder / shard["file"]
        if not path.is_file() or path.stat().st_size != shard["bytes"]:
            raise UserError(f"{path}: missing or truncated; copy or pack the set again")
    try:
        records = ArrayRecordDataSource([str(folder / shard["file"]) for shard in shards])
    except RuntimeError as error:
        raise UserError(f"{name}: damaged shards ({error}); pack the set again") from None

    def read_encoded(index: int) -> tuple[bytes, int]:
        try:
            record = records[index]
        except RuntimeError as error:
            raise UserError(f"damaged shard ({error}); pack the set again") from None
        return record[LABEL.size :], LABEL.unpack_from(record)[0]

    source = EncodedSource(
        name,
        len(records),
        read_encoded,
        lambda index: f"{name}: {split} image {index}",
        content=" ".join(shard["sha256"] for shard in shards),
        image_shape=tuple(manifest["image_shape"]),
        preprocessing="none",
        num_classes=len(manifest["label_names"]),
        label_names=manifest["label_names"],
        class_counts=lambda: np.array(manifest["splits"][split]["class_counts"], np.int64),
    )
    source.preprocessing = manifest["preprocessing"]
    return source
