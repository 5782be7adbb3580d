"""scikit-learn's handwritten digits: 1,797 images of 8x8 in 17 grey levels, as a TFDS builder of our own.

The builder yields PNG bytes, so that TFDS prepares it without TensorFlow. Splits, in scikit-learn's order:
"train" the first 1,500 images, "test" the last 297. Grey level v of 0..16 becomes round(255 v / 16).
"""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from tarflow_jax.data.source import ArraySource
from tarflow_jax.data.tfds import prepare_quietly, tfds_folder

NUM_TRAIN = 1500


class Digits(tfds.core.GeneratorBasedBuilder):
    """TFDS builder `digits`, version 1.0.0; features image uint8 [8, 8, 1] and label of 10 classes."""

    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded, so TFDS need not look beside the code for checksums.
    code_path = None

    def _info(self) -> tfds.core.DatasetInfo:
        image = tfds.features.Image(shape=(8, 8, 1), encoding_format="png")
        features = tfds.features.FeaturesDict({"image": image, "label": tfds.features.ClassLabel(num_classes=10)})
        description = "The 1,797 handwritten digits of scikit-learn's load_digits."
        return tfds.core.DatasetInfo(builder=self, description=description, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        rows = {"train": slice(NUM_TRAIN), "test": slice(NUM_TRAIN, None)}
        return {split: self._generate_examples(chosen) for split, chosen in rows.items()}

    def _generate_examples(self, rows: slice) -> Iterator[tuple[int, dict[str, bytes | int]]]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = np.rint(digits.images[rows] * (255 / 16)).astype(np.uint8)
        for index, (image, label) in enumerate(zip(images, digits.target[rows], strict=True)):
            file = io.BytesIO()
            Image.fromarray(image).save(file, "png")
            yield index, {"image": file.getvalue(), "label": int(label)}


def open_digits(split: str, data_dir: Path) -> ArraySource:
    """Prepares the digits under `data_dir` where that has not been done, and reads one split into memory."""
    builder = Digits(data_dir=str(tfds_folder(data_dir)), file_format="array_record")
    prepare_quietly(builder)
    records = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    records = records.__getitems__(range(len(records)))
    images = np.stack([np.asarray(Image.open(io.BytesIO(record["image"]))) for record in records])
    labels = np.array([record["label"] for record in records])
    return ArraySource("digits", images[..., None], labels, 10, [str(digit) for digit in range(10)])
