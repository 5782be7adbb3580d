"""Measures distances of images to a data set in its classifier's features, as launch.evaluate does."""

import jax
import numpy as np

from tarflow_jax.data import data_folder, open_source
from tarflow_jax.evaluation.classifier import classifier_network
from tarflow_jax.evaluation.distances import data_set_reference, sample_metrics
from tarflow_jax.evaluation.generation import quantise


class SampleMetrics:
    """Measures images against a data set, with its classifier and the features of its training images."""

    def __init__(self, name: str) -> None:
        self.train, self.test = (open_source(name, split) for split in ("train", "test"))
        folder = data_folder() / "evaluation"
        self.network = classifier_network(self.train, self.test, folder)
        self.reference = data_set_reference(self.network, self.train, "train", folder)

    def __call__(self, images: jax.Array | np.ndarray) -> dict[str, float]:
        """Returns distance, precision, recall and the number of images that are not finite.

        Images are uint8 or float in [-1, 1], [N, H, W, K].
        """
        pixels, bad = (images, np.zeros(0)) if images.dtype == np.uint8 else quantise(np.asarray(images))
        scores = sample_metrics(["fid", "precision_recall"], self.network.name, self.network(pixels), self.reference)
        named = zip(("distance", "precision", "recall"), scores.values(), strict=True)
        return dict(named) | {"not_finite": int(bad.sum())}
