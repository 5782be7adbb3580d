"""Any image set of TensorFlow Datasets, read from array_record without TensorFlow."""

import contextlib
import difflib
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import requests
import tensorflow_datasets as tfds

from tarflow_jax.data.source import NO_LABEL, EncodedSource, Options, count_labels
from tarflow_jax.errors import UserError, one_line

TIMEOUT_S = 25  # of a host that does not answer

# What stands in for "test" where a set has none, as ImageNet's published figures do.
TEST_SPLITS = ("test", "validation")


def tfds_folder(data_dir: Path) -> Path:
    """The folder of prepared TFDS sets under the data folder."""
    return data_dir / "tfds"


def load_builder(argument: str, folder: Path) -> tfds.core.DatasetBuilder:
    """The builder of NAME[/CONFIG][:VERSION]; ValueError where there is none, or its package is missing."""
    name = argument.split("/")[0].split(":")[0]
    known = tfds.list_builders(with_community_datasets=False)  # a look-up of those needs TensorFlow
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean tfds:{close[0]}?" if close else "; see tfds.list_builders()"
        raise UserError(f"tfds:{argument}: unknown data set{hint}")
    try:
        return tfds.builder(argument, data_dir=str(folder), try_gcs=False, file_format="array_record")
    except ImportError as error:
        raise UserError(f"tfds:{argument}: needs a package that is missing ({error}); install it") from None
    except (AssertionError, ValueError) as error:
        raise UserError(f"tfds:{argument}: {' '.join(str(error).split())}") from None


def prepare_tfds(argument: str, data_dir: Path) -> str:
    """Downloads and prepares a set as array_record under `data_dir`, unless that has been done; returns its name.

    Raises ValueError that names the package which is missing: most sets yield arrays, for which TFDS encodes
    PNG with TensorFlow (`pip install tensorflow-cpu`); preparing is the only step that needs it.
    """
    try:
        with download_timeouts(TIMEOUT_S):
            load_builder(argument, tfds_folder(data_dir)).download_and_prepare()
    except ImportError as error:
        package = {"tensorflow": "tensorflow-cpu"}.get((error.name or "").split(".")[0], error.name)
        raise UserError(
            f"tfds:{argument}: preparing it needs the optional package {package}; pip install {package}, "
            "prepare once, and training will not need it"
        ) from None
    except AssertionError as error:  # how TFDS asks for files that one has to fetch by hand
        raise UserError(f"tfds:{argument}: {' '.join(str(error).split())}") from None
    except requests.RequestException as error:
        raise UserError(
            f"tfds:{argument}: the download failed ({one_line(error)}); prepare it where there is a network, and copy "
            f"{tfds_folder(data_dir)} here"
        ) from None
    return f"tfds:{argument}"


@contextlib.contextmanager
def download_timeouts(seconds: float) -> Iterator[None]:
    """Within it a host that does not answer is an error after `seconds`; TFDS itself waits for ever."""
    send = requests.adapters.HTTPAdapter.send

    def send_in_time(self: Any, request: Any, *args: Any, **options: Any) -> Any:
        return send(self, request, *args, **options | {"timeout": options.get("timeout") or seconds})

    requests.adapters.HTTPAdapter.send = send_in_time  # type: ignore[method-assign]
    try:
        yield
    finally:
        requests.adapters.HTTPAdapter.send = send  # type: ignore[method-assign]


def prepare_quietly(builder: tfds.core.DatasetBuilder) -> None:
    """Prepares, with TFDS's bars on a terminal; processes that start together: the later take what the first wrote."""
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
    except OSError:
        if not Path(builder.data_dir, "dataset_info.json").exists():
            raise
        builder.info.read_from_directory(builder.data_dir)
    except RuntimeError as error:  # array_record's, of a disk that is full or fails
        raise UserError(
            f"{builder.info.full_name} cannot be written to {builder.data_dir}: {one_line(error)}"
        ) from error


def open_tfds(argument: str, split: str, options: Options) -> EncodedSource:
    """Opens one split of a prepared set; its features `image` and, if it has one, `label` are used.

    "test" is the set's test split, or else its validation split. Looks under the data folder, then where TFDS
    itself keeps its sets. Raises FileNotFoundError where it has not been prepared.
    """
    name = f"tfds:{argument}"
    builder = _find_prepared(argument, options.data_dir)
    features = dict(builder.info.features.items())
    feature = features.get("image")
    if not isinstance(feature, tfds.features.Image) or feature.np_dtype != np.uint8:
        raise UserError(f"{name}: has no uint8 feature `image`; only image sets can be trained on")
    names = (split,) if split == "train" else TEST_SPLITS
    chosen = next((known for known in names if known in builder.info.splits), None)
    if chosen is None:
        raise UserError(f"{name}: has no {split} split, only {', '.join(builder.info.splits)}")
    height, width, channels = feature.shape
    size = options.image_size or (height, width)
    if None in size:
        raise UserError(f"{name}: its images differ in size; an image size and a preprocessing are needed")
    classes = features.get("label")
    if not isinstance(classes, tfds.features.ClassLabel):
        classes = None
    num_classes = classes.num_classes if classes else 0
    records = builder.as_data_source(chosen, decoders={"image": tfds.decode.SkipDecoding()})

    def read_encoded(index: int) -> tuple[bytes, int]:
        record = records[index]
        return record["image"], int(record["label"]) if classes else NO_LABEL

    def class_counts() -> np.ndarray:
        return count_labels([read_encoded(index)[1] for index in range(len(records))], num_classes)

    return EncodedSource(
        name,
        len(records),
        read_encoded,
        lambda index: f"{name}: {chosen} image {index}",
        content=f"{builder.info.full_name}/{chosen}",
        image_shape=(*size, 1 if channels == 1 else 3),
        preprocessing=options.preprocessing,
        num_classes=num_classes,
        label_names=classes.names if classes else (),
        class_counts=class_counts,
    )


def _find_prepared(argument: str, data_dir: Path) -> tfds.core.DatasetBuilder:
    folders = [tfds_folder(data_dir), Path(tfds.core.constants.DATA_DIR).expanduser()]
    for folder in folders:
        builder = load_builder(argument, folder)
        if builder.is_prepared():
            return builder
    raise FileNotFoundError(
        f"tfds:{argument}: not prepared as array_record under {' or '.join(map(str, folders))}; "
        f"run python -m launch.prepare_data --data=tfds:{argument}"
    )
