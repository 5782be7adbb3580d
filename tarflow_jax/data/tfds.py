"""Reads image sets of TensorFlow Datasets from array_record, without TensorFlow."""

from pathlib import Path

import numpy as np
from etils import epy

from tarflow_jax.data.source import NO_LABEL, EncodedSource, Item, OpenOptions
from tarflow_jax.errors import UserError, one_line

with epy.lazy_imports():  # importing them takes a second
    import requests
    import tensorflow_datasets as tfds

# A set without a test split is evaluated on its validation split, as ImageNet is in published results.
TFDS_SPLITS = {"train": ("train",), "test": ("test", "validation")}


def load_builder(argument: str, data_dir: Path) -> "tfds.core.DatasetBuilder":
    """Returns the builder of NAME[/CONFIG][:VERSION]; raises UserError if there is none or its package is missing."""
    try:
        return tfds.builder(argument, data_dir=str(data_dir), try_gcs=False, file_format="array_record")
    except (ImportError, AssertionError, ValueError) as error:
        raise UserError(f"tfds:{argument}: {' '.join(str(error).split())[:300]}") from None


def prepare_tfds(argument: str, options: OpenOptions) -> str:
    """Downloads and prepares a set as array_record, unless that has been done. Returns the name to open it by.

    This is the only step for which most sets need TensorFlow, since TFDS encodes PNG with it.
    """
    folder = options.data_dir / "tfds"
    try:
        load_builder(argument, folder).download_and_prepare()
    except ImportError as error:
        raise UserError(
            f"tfds:{argument}: preparing it needs a package that is missing ({one_line(error)}), such as "
            "tensorflow-cpu; install it, prepare once, and training will not need it"
        ) from None
    except AssertionError as error:  # how TFDS asks for files that must be downloaded by hand
        raise UserError(f"tfds:{argument}: {' '.join(str(error).split())}") from None
    except (requests.RequestException, RuntimeError) as error:  # the latter from array_record, if the disk is full
        raise UserError(f"tfds:{argument} cannot be downloaded or written to {folder}: {one_line(error)}") from error
    return f"tfds:{argument}"


def open_tfds(argument: str, split: str, options: OpenOptions) -> EncodedSource:
    """Opens one split of a prepared set with an `image` feature and, optionally, a `label`.

    "test" is the set's test split, or its validation split if it has no test split. Searches the data folder, then
    TFDS's own. Raises FileNotFoundError if the set has not been prepared.
    """
    name = f"tfds:{argument}"
    folders = [options.data_dir / "tfds", Path(tfds.core.constants.DATA_DIR).expanduser()]
    builders = (load_builder(argument, folder) for folder in folders)
    builder = next((builder for builder in builders if builder.is_prepared()), None)
    if builder is None:
        raise FileNotFoundError(
            f"{name}: not prepared as array_record under {' or '.join(map(str, folders))}; "
            f"run python -m launch.prepare_data --data={name}"
        )
    features = dict(builder.info.features.items())
    feature = features.get("image")
    if not isinstance(feature, tfds.features.Image) or feature.np_dtype != np.uint8:
        raise UserError(f"{name}: has no uint8 feature `image`; only image sets can be trained on")
    chosen = next((known for known in TFDS_SPLITS[split] if known in builder.info.splits), None)
    if chosen is None:
        raise UserError(f"{name}: has no {split} split, only {', '.join(builder.info.splits)}")
    height, width, channels = feature.shape
    size = options.image_size or (height, width)
    if None in size:
        raise UserError(f"{name}: its images differ in size; an image size and a preprocessing are needed")
    classes = features.get("label")
    label_names = classes.names if isinstance(classes, tfds.features.ClassLabel) else ()
    records = builder.as_data_source(chosen, decoders={"image": tfds.decode.SkipDecoding()})

    def item_at(index: int) -> Item:
        record = records[index]
        label = int(record["label"]) if label_names else NO_LABEL
        return Item(f"{chosen} image {index}", label, lambda: record["image"])

    return EncodedSource(
        name,
        len(records),
        item_at,
        options,
        content=f"{builder.info.full_name}/{chosen}",
        image_shape=(*size, 1 if channels == 1 else 3),
        label_names=label_names,
    )
