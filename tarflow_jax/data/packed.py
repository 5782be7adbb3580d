"""Packed sets: preprocessed images as PNG in array_record shards, with a manifest.

A record is the label (int32, little endian) followed by a PNG. manifest.json is written last, once the set is
complete. Until then, every finished shard has a report beside it, from which an interrupted packing resumes.
"""

import dataclasses
import io
import json
import struct
from collections.abc import Iterable, Mapping
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from PIL import Image
from tqdm import tqdm

from tarflow_jax.data.folder import hash_items, list_folder, refuse_bad
from tarflow_jax.data.images import BACKGROUND, decode_image, preprocess
from tarflow_jax.data.source import MANIFEST, NO_LABEL, SPLITS, EncodedSource, Item, OpenOptions, read_manifest
from tarflow_jax.errors import UserError, one_line
from tarflow_jax.files import replacing, sha256, write_text

CAPTIONS = "captions-{}.jsonl"
FORMAT = 1
IMAGES_PER_SHARD = 1024
LABEL = struct.Struct("<i")


def prepare_folder(argument: str, options: OpenOptions) -> str:
    """Packs an image folder under the data folder. Returns the name to open it by."""
    root = Path(argument).expanduser()
    listings = {split: list_folder(root, split) for split in SPLITS}
    splits = {split: items for split, (items, _) in listings.items()}
    return pack_as(root.resolve().name, f"folder:{root}", splits, listings["train"][1], options)


def pack_as(
    stem: str, name: str, splits: Mapping[str, list[Item]], label_names: tuple[str, ...], options: OpenOptions
) -> str:
    """Packs images into data_dir/packed/STEM-SIZE-PREPROCESSING. Returns the name to open the set by."""
    size = "x".join(map(str, options.image_size or ()))
    output = options.data_dir / "packed" / f"{stem}-{size}-{options.preprocessing}"
    pack(name, splits, label_names, output, options)
    return f"packed:{output}"


def pack(
    name: str, splits: Mapping[str, list[Item]], label_names: tuple[str, ...], folder: Path, options: OpenOptions
) -> None:
    """Packs the images of every split into `folder`, as RGB of `options.image_size`, or resumes an interrupted packing.

    Raises UserError if files are bad, the folder holds another set, or a packed shard has changed.
    """
    image_size = options.image_size
    if image_size is None:
        raise UserError(f"{name}: packing needs an image size; give one")
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

    bad: dict[str, str] = {}
    summaries = {}
    with ThreadPool() as pool:
        for split, items in splits.items():
            reports = []
            starts = range(0, len(items), IMAGES_PER_SHARD)
            for index, start in enumerate(tqdm(starts, f"packing {split}", unit="shard")):
                path = folder / f"{split}-{index:05d}.array_record"
                shard = items[start : start + IMAGES_PER_SHARD]
                reports.append(_finished(path, key) or write_shard(path, key, shard, pool.imap(encode, shard)))
            labels = np.array([label for report in reports for label in report["labels"]], np.int64)
            summaries[split] = {
                "images": len(labels),
                "skipped": len(items) - len(labels),
                "class_counts": np.bincount(labels[labels != NO_LABEL], minlength=len(label_names)).tolist(),
                "shards": [report["shard"] for report in reports if report["labels"]],
            }
            captions = [texts for report in reports for texts in report["captions"]]
            if any(captions):
                file = folder / CAPTIONS.format(split)
                write_text(file, "".join(json.dumps(texts) + "\n" for texts in captions))
                summaries[split]["captions"] = sha256(file)
            for report in reports:
                bad |= report["bad"]
    refuse_bad(name, bad, sum(map(len, splits.values())), options.skip_bad)
    manifest = {
        "format": FORMAT,
        "name": name,
        "fingerprint": key,
        "image_shape": [*image_size, 3],
        "preprocessing": options.preprocessing,
        "background": BACKGROUND,
        "label_names": list(label_names),
        "splits": summaries,
    }
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    for shard_report in folder.glob("*-*.json"):
        shard_report.unlink()


def _finished(path: Path, key: str) -> dict[str, Any] | None:
    """Returns the report of a shard if an interrupted packing of the same set finished it, else None."""
    try:
        report = json.loads(path.with_suffix(".json").read_text())
        return report if (report["fingerprint"], report["shard"]["sha256"]) == (key, sha256(path)) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def write_shard(path: Path, key: str, items: list[Item], encoded: Iterable[bytes | ValueError]) -> dict[str, Any]:
    """Writes the items that could be encoded as one shard, and its report. Returns the report."""
    written: list[Item] = []
    bad: dict[str, str] = {}
    with replacing(path) as file:
        writer = ArrayRecordWriter(file.name, "group_size:1")
        try:
            for item, outcome in zip(items, encoded, strict=True):
                if isinstance(outcome, ValueError):
                    bad[item.name] = str(outcome)
                else:
                    writer.write(LABEL.pack(item.label) + outcome)
                    written.append(item)
            writer.close()
        except RuntimeError as error:  # raised by ArrayRecord, even when the disk is full
            raise OSError(f"could not write {path}: {one_line(error)}; free some space or fix the disk") from error
    report = {
        "fingerprint": key,
        "shard": {"file": path.name, "images": len(written), "bytes": path.stat().st_size, "sha256": sha256(path)},
        "labels": [item.label for item in written],
        "captions": [item.captions for item in written],
        "bad": bad,
    }
    write_text(path.with_suffix(".json"), json.dumps(report, indent=1) + "\n")
    return report


def _check_packed(name: str, folder: Path, key: str) -> None:
    """Raises UserError unless the folder holds exactly this set, with unchanged shards."""
    manifest = read_manifest(folder, FORMAT)
    if manifest["fingerprint"] != key:
        raise UserError(f"{name}: {folder} holds other files or preprocessing; remove it or choose another data_dir")
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            if sha256(folder / shard["file"]) != shard["sha256"]:
                raise UserError(f"{folder / shard['file']}: changed since it was packed; remove {folder}")


def open_packed(argument: str, split: str, options: OpenOptions, name: str | None = None) -> EncodedSource:
    """Opens one split of the packed set in the folder `argument`. On gs://, every image is a request.

    `name` appears in messages; None stands for "packed:FOLDER". Preprocessing "none" accepts the set as it was packed.
    Raises FileNotFoundError if there is no packed set, UserError if it is damaged or has another preprocessing.
    """
    folder, name = epath.Path(argument).expanduser(), name or f"packed:{argument}"
    manifest = read_manifest(folder, FORMAT)
    try:
        packed_with, (height, width, _) = manifest["preprocessing"], manifest["image_shape"]
        label_names, class_counts = manifest["label_names"], manifest["splits"][split]["class_counts"]
        shards = manifest["splits"][split]["shards"]
        files = [str(folder / shard["file"]) for shard in shards]
        content = " ".join(shard["sha256"] for shard in shards)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder / MANIFEST}: damaged ({error!r}); pack the set again") from None
    if options.preprocessing not in ("none", packed_with):
        raise UserError(f"{name}: packed with preprocessing {packed_with}, not {options.preprocessing}; pack it again")
    try:
        records = ArrayRecordDataSource(files)
    except RuntimeError as error:
        raise UserError(f"{name}: shards are missing or damaged ({error}); copy or pack the set again") from None

    def item_at(index: int) -> Item:
        try:
            record = records[index]
        except RuntimeError as error:
            reason = f"cannot be read ({error}); if its shard is damaged, pack the set again"
            raise UserError(f"{name}: {split} image {index} {reason}") from None
        return Item(f"{split} image {index}", LABEL.unpack_from(record)[0], lambda: record[LABEL.size :])

    source = EncodedSource(
        name,
        len(records),
        item_at,
        dataclasses.replace(options, preprocessing="none"),
        content=content,
        image_shape=(height, width, 3),
        label_names=label_names,
        class_counts=class_counts,
    )
    source.preprocessing = packed_with
    if expected := manifest["splits"][split].get("captions"):
        file = folder / CAPTIONS.format(split)
        if not file.exists() or sha256(file) != expected:
            raise UserError(f"{file}: missing or damaged; copy or pack the set again")
        source.captions = [tuple(json.loads(line)) for line in file.read_text().splitlines()]
    return source
