"""Small convolutional classifiers of a data set, trained once and cached.

`classifier_network` is a feature network for data sets where Inception makes no sense. Distances between its features
compare two models of one data set under the same weights, which the printed identity names. They are not FID.
`perceptual_network_params` are the weights of a student's perceptual loss, which measures nothing.
"""

import dataclasses
import functools
import hashlib
import math
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import save

from tarflow_jax.data import ImageSource
from tarflow_jax.errors import UserError
from tarflow_jax.evaluation.features import FeatureNetwork, Features, cache_errors_logged
from tarflow_jax.files import replacing
from tarflow_jax.interop.tensors import flatten, read_safetensors
from tarflow_jax.runtime import progress
from tarflow_jax.student import Perception

RECIPE = "3 strided convolutions of 32, 64, 128; AdamW 2e-3, cosine, batch 256, 6 epochs, at least 1,000 steps"
BATCH_SIZE, MIN_STEPS = 256, 1000
PERCEPTUAL_BATCH_SIZE, PERCEPTUAL_MAX_STEPS = 64, 1000
PREPROCESSING = "none: 8-bit images of the data set's own size, v / 127.5 - 1"


class Classifier(nn.Module):
    """Images uint8 [B, H, W, K] to pooled [B, 128], the last hidden layer, and logits [B, num_classes]."""

    num_classes: int

    @nn.compact
    def __call__(self, images: jax.Array) -> Features:
        x = images.astype(jnp.float32) / 127.5 - 1.0
        for width in (32, 64, 128):
            x = nn.relu(nn.Conv(width, (3, 3), strides=2)(x))
        pooled = nn.relu(nn.Dense(128)(x.reshape(x.shape[0], -1)))
        return Features(pooled, nn.Dense(self.num_classes)(pooled))


def train_classifier(source: ImageSource, model: nn.Module, steps: int, batch_size: int, seed: int) -> dict[str, Any]:
    """Trains a network from images uint8 [B, H, W, K] to `.logits`, with AdamW at 2e-3 and a cosine; returns params."""
    optimizer = optax.adamw(optax.cosine_decay_schedule(2e-3, steps))
    images, labels = source.read(np.arange(len(source)))
    params = model.init(jax.random.key(seed), jnp.asarray(images[:1]))["params"]
    state = optimizer.init(params)

    def loss(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = model.apply({"params": params}, images).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Any, state: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, Any]:
        gradient = jax.grad(loss)(params, images, labels)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to the power of its step counter
            updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    random = np.random.default_rng(seed)
    for _ in progress(range(steps), f"classifier of {source.name}"):
        batch = random.choice(len(images), batch_size)
        params, state = update(params, state, jnp.asarray(images[batch]), jnp.asarray(labels[batch]))
    return params


def classifier_network(train: ImageSource, test: ImageSource, cache_dir: str | Path) -> FeatureNetwork:
    """Returns the classifier of a data set as a feature network; trains it unless `cache_dir` has it.

    Its `identity` gives its accuracy on `test`. Raises UserError for unlabelled images.
    """
    if train.num_classes < 2:
        raise UserError(
            f"{train.name} has no classes to train a classifier on; name Inception weights, --inception=FILE"
        )
    model = Classifier(train.num_classes)
    steps = max(6 * len(train) // BATCH_SIZE, MIN_STEPS)
    params = _read_or_train(Path(cache_dir), "classifier", train, model, steps, BATCH_SIZE, seed=0)
    activations = 4 * 16 * math.prod(train.image_shape[:2])  # twice the first layer's outputs
    network = FeatureNetwork("classifier", "", PREPROCESSING, model, params, activations)
    images, labels = test.read(np.arange(len(test)))
    accuracy = (network(images, "accuracy of the classifier").logits.argmax(1) == labels).mean()
    digest = hashlib.sha256(_file_content(params)).hexdigest()  # not of the file: another process may replace it
    identity = f"sha256 {digest} (test accuracy {accuracy:.4f}; {RECIPE})"
    return dataclasses.replace(network, identity=identity)


def perceptual_network_params(train: ImageSource, cache_dir: str | Path) -> dict[str, Any]:
    """Returns the parameters of a `Perception` network of a data set's classes; trains it unless `cache_dir` has it.

    Raises UserError for unlabelled images.
    """
    if train.num_classes < 2:
        raise UserError(f"{train.name} has no classes to train a perceptual network on; set student.perceptual to 0")
    steps = min(10 * len(train) // PERCEPTUAL_BATCH_SIZE, PERCEPTUAL_MAX_STEPS)
    model = Perception(train.num_classes)
    return _read_or_train(Path(cache_dir), "perception", train, model, steps, PERCEPTUAL_BATCH_SIZE, seed=1)


def _read_or_train(
    cache_dir: Path, kind: str, source: ImageSource, model: nn.Module, steps: int, batch_size: int, seed: int
) -> dict[str, Any]:
    """Returns the parameters that the cache holds for these images and classes, after training them if it has none."""
    path = cache_dir / f"{kind}-{source.num_classes}-{source.fingerprint[:16]}.safetensors"
    if not path.is_file():
        params = train_classifier(source, model, steps, batch_size, seed)
        with cache_errors_logged(), replacing(path) as file:
            file.write(_file_content(params))
        return params
    image = jax.ShapeDtypeStruct((1, *source.image_shape), jnp.uint8)
    expected = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    try:
        return read_safetensors(path, {name: x.shape for name, x in flatten(expected).items()})
    except UserError as error:
        raise UserError(f"{error}; delete it to train the network again") from error


def _file_content(params: dict[str, Any]) -> bytes:
    return save({name: np.asarray(x) for name, x in flatten(params).items()})
