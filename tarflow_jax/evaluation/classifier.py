"""Small convolutional classifiers of a data set, trained once and cached.

`classifier_network` is a feature network for data sets where Inception makes no sense. Distances between its features
compare two models of one data set under the same weights, which the printed identity names. They are not FID.
`perceptual_network_params` are the weights of a student's perceptual loss, which measures nothing.
"""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from tarflow_jax.data import ImageSource
from tarflow_jax.errors import UserError
from tarflow_jax.evaluation.features import FeatureExtractor, FeatureNetwork, Features
from tarflow_jax.evaluation.generation import file_stem
from tarflow_jax.files import replacing, sha256
from tarflow_jax.runtime import progress
from tarflow_jax.student import Perception

RECIPE = "3 strided convolutions of 32, 64, 128; AdamW 2e-3, cosine, batch 256, 6 epochs, at least 1,000 steps"
BATCH_SIZE, MIN_STEPS = 256, 1000
PERCEPTUAL_RECIPE = (
    "3 pairs of convolutions of 24, 48, 96; AdamW 2e-3, cosine, batch 64, 10 epochs or 1,000 steps, seed 1"
)
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


def train_classifier(
    source: ImageSource, model: nn.Module, steps: int, batch_size: int = BATCH_SIZE, seed: int = 0
) -> dict[str, Any]:
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

    Its `identity` gives its accuracy on `test`. Raises UserError for unlabelled images, and for a cached file of
    another classifier.
    """
    if train.num_classes < 2:
        raise UserError(
            f"{train.name} has no classes to train a classifier on; name Inception weights, --inception=FILE"
        )
    model = Classifier(train.num_classes)

    def network(params: Any, identity: str) -> FeatureNetwork:
        activations = 4 * 16 * math.prod(train.image_shape[:2])  # twice the first layer's outputs
        return FeatureNetwork("classifier", identity, PREPROCESSING, params, _apply(train.num_classes), activations)

    def fit() -> tuple[Any, dict[str, str]]:
        params = train_classifier(train, model, steps=max(6 * len(train) // BATCH_SIZE, MIN_STEPS))
        images, labels = test.read(np.arange(len(test)))
        logits = FeatureExtractor(network(params, "not saved yet"))(images).logits
        return params, {"accuracy": repr(float((logits.argmax(-1) == labels).mean()))}

    path = _cache_path(cache_dir, "classifier", train)
    params, metadata = _read_or_fit(path, train, model, RECIPE, fit)
    return network(params, f"sha256 {sha256(path)} (test accuracy {float(metadata['accuracy']):.4f}; {RECIPE})")


@functools.cache
def _apply(num_classes: int) -> Callable[[Any, jax.Array], Features]:
    return lambda params, images: Classifier(num_classes).apply({"params": params}, images)


def perceptual_network_params(train: ImageSource, cache_dir: str | Path) -> dict[str, Any]:
    """Returns the parameters of a `Perception` network of a data set's classes; trains it unless `cache_dir` has it.

    Raises UserError for unlabelled images, and for a cached file of another network.
    """
    if train.num_classes < 2:
        raise UserError(f"{train.name} has no classes to train a perceptual network on; set student.perceptual to 0")
    model = Perception(train.num_classes)

    def fit() -> tuple[Any, dict[str, str]]:
        steps = min(10 * len(train) // PERCEPTUAL_BATCH_SIZE, PERCEPTUAL_MAX_STEPS)
        return train_classifier(train, model, steps, PERCEPTUAL_BATCH_SIZE, seed=1), {}

    return _read_or_fit(_cache_path(cache_dir, "perception", train), train, model, PERCEPTUAL_RECIPE, fit)[0]


def _cache_path(cache_dir: str | Path, kind: str, source: ImageSource) -> Path:
    shape = "x".join(map(str, source.image_shape))
    return Path(cache_dir) / f"{file_stem(kind, source.name, shape)}.safetensors"


def _read_or_fit(
    path: Path, source: ImageSource, model: nn.Module, recipe: str, fit: Callable[[], tuple[Any, dict[str, str]]]
) -> tuple[Any, dict[str, str]]:
    """Returns (parameters, metadata) of the network in a file, which `fit` makes if the file is missing."""
    described = {"recipe": recipe, "data_set": source.name, "num_images": str(len(source))}
    if not path.is_file():
        params, more = fit()
        arrays = {name: np.asarray(x) for name, x in flatten_dict(params, sep="/").items()}
        with replacing(path) as file:
            file.write(save(arrays, described | more))
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            params = unflatten_dict({name: file.get_tensor(name) for name in file.keys()}, sep="/")  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no safetensors file ({error}); delete it to train the classifier again") from error
    image = jax.ShapeDtypeStruct((1, *source.image_shape), jnp.uint8)
    expected = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    same_shapes = jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, expected)
    if not same_shapes or not described.items() <= metadata.items():
        raise UserError(f"{path} holds another classifier; delete it to train this one")
    return jax.tree.map(jnp.asarray, params), metadata
