"""Packed sets: preprocessed images as PNG in array_record shards, with a manifest.

A record is the label (int32, little endian) followed by a PNG. The manifest.json is written last, once the set is
complete. Until then every finished shard has a report beside it, from which an interrupted packing resumes.
"""

import dataclasses
import io
import json
import os
import struct
from collections.abc import Iterable, Mapping
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tqdm import tqdm

from tarflow_jax.data.folder import hash_items, list_folder, refuse_bad
from tarflow_jax.data.images import BACKGROUND, PREPROCESSINGS, decode_image, preprocess
from tarflow_jax.data.source import NO_LABEL, SPLITS, EncodedSource, Item, Options
from tarflow_jax.errors import UserError
from tarflow_jax.files import sha256, write_text

MANIFEST = "manifest.json"
FORMAT = 1
IMAGES_PER_SHARD = 1024
LABEL = struct.Struct("<i")


def prepare_folder(argument: str, options: Options) -> str:
    """Packs an image folder under the data folder. Returns the name to open it by."""
    root = Path(argument).expanduser()
    listings = {split: list_folder(root, split) for split in SPLITS}
    if options.image_size is None:
        raise UserError(f"folder:{root}: packing needs an image size; give one")
    height, width = options.image_size
    output = options.data_dir / "packed" / f"{root.resolve().name}-{height}x{width}-{options.preprocessing}"
    splits = {split: items for split, (items, _) in listings.items()}
    pack(f"folder:{root}", splits, listings["train"][1], output, options.image_size, options)
    return f"packed:{output}"


def pack(
    name: str,
    splits: Mapping[str, list[Item]],
    label_names: tuple[str, ...],
    folder: Path,
    image_size: tuple[int, int],
    options: Options,
) -> None:
    """Packs the images of every split into `folder`, or resumes an interrupted packing.

    The manifest records the preprocessing, the image size and the label names, and for each split the number of
    images, of skipped files, of images of each class, and the shards with their SHA-256.

    Args:
      name: of the set, for messages and the manifest.
      splits: split -> images.
      label_names: one per class; () for unlabelled images.
      folder: output folder, created if it does not exist.
      image_size: (H, W) of the packed images, which are RGB.
      options: gives the preprocessing, and whether to leave out bad files.

    Raises ValueError: files are bad (all are listed), the folder holds another set, or a packed shard has changed.
    """
    num_images = sum(map(len, splits.values()))
    parts = [(split, hash_items(items)) for split, items in splits.items()]
    key = hash_items([], FORMAT, parts, label_names, image_size, options.preprocessing)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / MANIFEST).exists():
        _check_packed(name, folder, key)
        return

    def encode(item: Item) -> bytes | ValueError:
        try:
            array = preprocess(decode_image(item.read()), options.preprocessing, image_size)
        except ValueError as error:
            return error
        file = io.BytesIO()
        # The fastest level: files are slightly larger and decode as fast.
        Image.fromarray(array).save(file, "png", compress_level=1)
        return file.getvalue()

    reports: dict[str, list[dict[str, Any]]] = {split: [] for split in splits}
    with tqdm(total=num_images, desc=f"packing {name}") as bar, ThreadPool() as pool:
        for split, items in splits.items():
            for index, start in enumerate(range(0, len(items), IMAGES_PER_SHARD)):
                path = folder / f"{split}-{index:05d}.array_record"
                shard = items[start : start + IMAGES_PER_SHARD]
                report = _finished(path, key)
                if report:
                    bar.update(len(shard))
                else:
                    report = write_shard(path, key, shard, pool.imap(encode, shard), bar)
                reports[split].append(report)
    bad = {path: why for split in reports.values() for report in split for path, why in report["bad"]}
    refuse_bad(name, bad, num_images, options.skip_bad)
    manifest = {
        "format": FORMAT,
        "name": name,
        "fingerprint": key,
        "image_shape": [*image_size, 3],
        "preprocessing": options.preprocessing,
        "background": BACKGROUND,
        "label_names": list(label_names),
        "splits": {split: _summarize(of_split, len(label_names)) for split, of_split in reports.items()},
    }
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    for shard_report in folder.glob("*-*.json"):
        shard_report.unlink()


def _finished(path: Path, key: str) -> dict[str, Any] | None:
    """Returns the report of a shard that an interrupted packing of the same set has finished, or None."""
    try:
        report = json.loads(path.with_suffix(".json").read_text())
        return report if report["fingerprint"] == key and report["sha256"] == sha256(path) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def write_shard(
    path: Path, key: str, items: list[Item], encoded: Iterable[bytes | ValueError], bar: tqdm
) -> dict[str, Any]:
    """Writes the good ones of the items as one shard, and its report. Returns the report."""
    labels: list[int] = []
    bad: list[tuple[str, str]] = []
    partial = path.with_name(f".{path.name}.partial")
    try:
        writer = ArrayRecordWriter(str(partial), "group_size:1")
        for item, outcome in zip(items, encoded, strict=True):
            if isinstance(outcome, ValueError):
                bad.append((item.name, str(outcome)))
            else:
                writer.write(LABEL.pack(item.label) + outcome)
                labels.append(item.label)
            bar.update()
        writer.close()
        report = {
            "fingerprint": key,
            "file": path.name,
            "images": len(labels),
            "bytes": partial.stat().st_size,
            "sha256": sha256(partial),
            "class_counts": np.bincount([label for label in labels if label != NO_LABEL]).tolist(),
            "bad": bad,
        }
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    write_text(path.with_suffix(".json"), json.dumps(report, indent=1) + "\n")
    return report


def _summarize(reports: list[dict[str, Any]], num_classes: int) -> dict[str, Any]:
    """Returns the manifest's entry for one split."""
    counts = np.zeros(num_classes, np.int64)
    for report in reports:
        counts[: len(report["class_counts"])] += report["class_counts"]
    shard_keys = ("file", "images", "bytes", "sha256")
    return {
        "images": sum(report["images"] for report in reports),
        "skipped": sum(len(report["bad"]) for report in reports),
        "class_counts": counts.tolist(),
        "shards": [{key: report[key] for key in shard_keys} for report in reports if report["images"]],
    }


def _check_packed(name: str, folder: Path, key: str) -> None:
    """Raises ValueError unless the folder holds this very set, with unchanged shards."""
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
    """Reads and checks the manifest of a packed set.

    Raises FileNotFoundError where there is none, and ValueError where it is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} is not a packed set, it has no {MANIFEST}; pack one with "
            "python -m launch.prepare_data --data=folder:PATH"
        )
    try:
        manifest = json.loads(path.read_text())
        height, width, channels = manifest["image_shape"]
        names, splits = manifest["label_names"], manifest["splits"].values()
        shards = [shard for split in splits for shard in split["shards"]]
        counts = [split["class_counts"] for split in splits]
        valid = (
            manifest["format"] == FORMAT
            and manifest["preprocessing"] in PREPROCESSINGS
            and channels == 3
            and all(type(size) is int and size > 0 for size in (height, width, *(shard["bytes"] for shard in shards)))
            and all(type(text) is str for text in (*names, *(shard["sha256"] for shard in shards)))
            and all(Path(shard["file"]).name == shard["file"] for shard in shards)
            and all(len(of_split) == len(names) for of_split in counts)
            and all(type(count) is int and count >= 0 for of_split in counts for count in of_split)
        )
        if not valid:
            raise UserError("unexpected values")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: damaged or from another version ({error}); pack the set again") from None
    return manifest


def open_packed(argument: str, split: str, options: Options, name: str | None = None) -> EncodedSource:
    """Opens one split of the packed set in the folder `argument`; `name` is for messages, "packed:FOLDER" if None.

    Preprocessing "none" accepts the set as it was packed. Raises FileNotFoundError where there is no packed set, and
    ValueError where it was packed with another preprocessing or shards are missing or truncated.
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

    def item_at(index: int) -> Item:
        item = f"{split} image {index}"
        try:
            record = records[index]
        except RuntimeError as error:
            raise UserError(f"{name}: {item}: damaged shard ({error}); pack the set again") from None
        return Item(item, LABEL.unpack_from(record)[0], lambda: record[LABEL.size :])

    source = EncodedSource(
        name,
        len(records),
        item_at,
        dataclasses.replace(options, preprocessing="none"),
        content=" ".join(shard["sha256"] for shard in shards),
        image_shape=tuple(manifest["image_shape"]),
        label_names=manifest["label_names"],
        class_counts=np.array(manifest["splits"][split]["class_counts"], np.int64),
    )
    source.preprocessing = manifest["preprocessing"]  # applied when the set was packed
    return source
