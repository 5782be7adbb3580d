"""Small convolutional classifiers of a data set: judges shipped in models/, others trained once and cached.

`classifier_network` is a feature network for data sets on which Inception is meaningless. Distances between its
features compare models of one data set under the same weights, which the printed identity names. They are not FID.
Data sets with published figures have a judge, so that all machines measure with the same weights: a classifier in
models/judges/NAME/model.safetensors, with its hash and accuracy in judge.json. `perceptual_network_params` returns
the weights of a student's perceptual loss, which are not used for measurements.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
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
from tarflow_jax.errors import UserError, one_line
from tarflow_jax.evaluation.features import FeatureNetwork, Features, cache_errors_logged
from tarflow_jax.files import replacing, sha256
from tarflow_jax.interop.model_folder import shipped
from tarflow_jax.interop.tensors import flatten, read_safetensors
from tarflow_jax.runtime import progress
from tarflow_jax.runtime.parameters import Shape
from tarflow_jax.student import Perception

RECIPE = "3 strided convolutions of 32, 64, 128; AdamW 2e-3, cosine, batch 256, 6 epochs, at least 1,000 steps"
BATCH_SIZE, MIN_STEPS = 256, 1000
PERCEPTUAL_BATCH_SIZE, PERCEPTUAL_MAX_STEPS = 64, 1000
PREPROCESSING = "none: 8-bit images of the data set's own size, v / 127.5 - 1"
JUDGE, WEIGHTS = "judge.json", "model.safetensors"
SAME_ACCURACY = 0.005  # processors round differently, which flips a few ambiguous images
logger = logging.getLogger(__name__)


class Classifier(nn.Module):
    """Maps images uint8 [B, H, W, K] to pooled [B, 128], the last hidden layer, and logits [B, num_classes]."""

    num_classes: int

    @nn.compact
    def __call__(self, images: jax.Array) -> Features:
        x = images.astype(jnp.float32) / 127.5 - 1.0
        for width in (32, 64, 128):
            x = nn.relu(nn.Conv(width, (3, 3), strides=2)(x))
        pooled = nn.relu(nn.Dense(128)(x.reshape(x.shape[0], -1)))
        return Features(pooled, nn.Dense(self.num_classes)(pooled))


def train_classifier(source: ImageSource, model: nn.Module, steps: int, batch_size: int, seed: int) -> dict[str, Any]:
    """Trains a network that maps images uint8 [B, H, W, K] to `.logits`; returns its parameters."""
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
    """Returns a classifier as a feature network: the data set's judge, else one from `cache_dir`, else a new one.

    Its `identity` gives its accuracy on `test`. Raises UserError for unlabelled images and a damaged judge.
    """
    if train.num_classes < 2:
        raise UserError(f"{train.name} has no classes for a classifier; name Inception weights, --inception=FILE")
    images, labels = test.read(np.arange(len(test)))

    def accuracy(network: FeatureNetwork) -> float:
        return float((network(images, "accuracy of the classifier").logits.argmax(1) == labels).mean())

    if judge := read_judge(train):
        network, stated = judge
        measured = accuracy(network)
        if abs(measured - stated) <= SAME_ACCURACY:
            return network
        message = "the judge of %s gets %.4f of these test images right, not %.4f: they are others, it is not used"
        logger.warning(message, train.name, measured, stated)
    model = Classifier(train.num_classes)
    params = _read_or_train(Path(cache_dir), "classifier", train, model, num_steps(train), BATCH_SIZE, seed=0)
    network = _network(train, params, "")
    digest = hashlib.sha256(_file_content(params)).hexdigest()  # not the file's, which another process may replace
    return dataclasses.replace(network, identity=_identity(digest, accuracy(network)))


def num_steps(train: ImageSource) -> int:
    """Returns the number of steps for which a classifier of these images is trained."""
    return max(6 * len(train) // BATCH_SIZE, MIN_STEPS)


def read_judge(train: ImageSource) -> tuple[FeatureNetwork, float] | None:
    """Reads the judge for a data set of this name, shape and number of classes; returns None if there is none.

    Returns it with the accuracy stated in judge.json. Raises UserError for damaged files.
    """
    path = shipped(f"judges/*/{JUDGE}").get(train.name)
    if path is None:
        return None
    weights = path.with_name(WEIGHTS)
    try:
        fields = json.loads(path.read_bytes())
        shape, digest, accuracy = fields["image_shape"], str(fields["sha256"]), float(fields["accuracy"])
        if (shape, fields["num_classes"]) != (list(train.image_shape), train.num_classes):
            return None
        if sha256(weights) != digest:
            raise UserError(f"{WEIGHTS} does not match the checksum in it")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} or {WEIGHTS} beside it is damaged ({one_line(error)}); copy both again") from error
    params = read_safetensors(weights, _shapes(Classifier(train.num_classes), train))
    return _network(train, params, f"judge {train.name}, {_identity(digest, accuracy)}"), accuracy


def _network(train: ImageSource, params: dict[str, Any], identity: str) -> FeatureNetwork:
    activations = 4 * 16 * math.prod(train.image_shape[:2])  # twice the first layer's outputs
    model = Classifier(train.num_classes)
    return FeatureNetwork("classifier", identity, PREPROCESSING, model, params, activations)


def _identity(digest: str, accuracy: float) -> str:
    return f"sha256 {digest} (test accuracy {accuracy:.4f}; {RECIPE})"


def perceptual_network_params(
    train: ImageSource, cache_dir: str | Path, max_steps: int = PERCEPTUAL_MAX_STEPS
) -> dict[str, Any]:
    """Returns the parameters of a `Perception` network for a data set, from `cache_dir` or newly trained.

    Raises UserError for unlabelled images.
    """
    if train.num_classes < 2:
        raise UserError(f"{train.name} has no classes to train a perceptual network on; set student.perceptual to 0")
    steps = min(10 * len(train) // PERCEPTUAL_BATCH_SIZE, max_steps)
    kind = "perception" if max_steps == PERCEPTUAL_MAX_STEPS else f"perception{steps}"
    model = Perception(train.num_classes)
    return _read_or_train(Path(cache_dir), kind, train, model, steps, PERCEPTUAL_BATCH_SIZE, seed=1)


def _read_or_train(
    cache_dir: Path, kind: str, source: ImageSource, model: nn.Module, steps: int, batch_size: int, seed: int
) -> dict[str, Any]:
    """Returns the cached parameters for these images and classes; trains them if the file is missing or damaged."""
    path = cache_dir / f"{kind}-{source.num_classes}-{source.fingerprint[:16]}.safetensors"
    with contextlib.suppress(FileNotFoundError, UserError):
        return read_safetensors(path, _shapes(model, source))
    params = train_classifier(source, model, steps, batch_size, seed)
    with cache_errors_logged(), replacing(path) as file:
        file.write(_file_content(params))
    return params


def _shapes(model: nn.Module, source: ImageSource) -> dict[str, Shape]:
    image = jax.ShapeDtypeStruct((1, *source.image_shape), jnp.uint8)
    expected = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    return {name: x.shape for name, x in flatten(expected).items()}


def _file_content(params: dict[str, Any]) -> bytes:
    return save({name: np.asarray(x) for name, x in flatten(params).items()})
