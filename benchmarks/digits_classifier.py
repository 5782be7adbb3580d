"""Measures the share of a model's digits that a classifier of real digits assigns to their label.

    python -m benchmarks.digits_classifier WORKDIR …

The classifier is a convolutional network trained, independently of the flow, on the 1,500 training images under random
rotations, shears, scalings and shifts. It is cached in runs/digits_classifier.msgpack.
"""

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax

from tarflow_jax.data import open_source
from tarflow_jax.figures import to_uint8
from tarflow_jax.pipeline import TarFlowPipeline
from tarflow_jax.sampling import Guidance, Student

STEPS, BATCH_SIZE, SAMPLES = 1500, 128, 1000
CACHE = Path("runs/digits_classifier.msgpack")


class DigitsClassifier(nn.Module):
    """Images in [0, 1], [B, 8, 8], to logits [B, 10]."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = 2 * images[..., None] - 1
        for width in (32, 64, 64):
            x = nn.relu(nn.GroupNorm(8)(nn.Conv(width, (3, 3))(x)))
        x = nn.max_pool(x, (2, 2), (2, 2))
        for width in (64, 64):
            x = nn.relu(nn.GroupNorm(8)(nn.Conv(width, (3, 3))(x)))
        x = nn.relu(nn.Dense(128)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(x)


def augmented(key: jax.Array, images: jax.Array) -> jax.Array:
    """Rotates images [B, 8, 8] by about 10 degrees, shears, scales and shifts them by about 0.7 pixels."""
    keys = jax.random.split(key, 4)
    count = len(images)
    angle, shear = jax.random.normal(keys[0], (2, count)) * jnp.array([[np.pi / 18], [0.15]])
    scale = jnp.exp(0.1 * jax.random.normal(keys[1], (2, count)))
    rotation = jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
    stretch = jnp.array([[scale[0], shear], [jnp.zeros(count), scale[1]]])
    grid = jnp.stack(jnp.meshgrid(jnp.arange(8.0), jnp.arange(8.0), indexing="ij")).reshape(2, 64) - 3.5
    places = (
        jnp.einsum("ijB,jkB,kn->Bin", rotation, stretch, grid) + 3.5 + 0.7 * jax.random.normal(keys[2], (count, 2, 1))
    )
    moved = jax.vmap(lambda image, at: jax.scipy.ndimage.map_coordinates(image, list(at), 1))(images, places)
    noise = 0.05 * jax.random.normal(keys[3], images.shape)
    return jnp.clip(moved.reshape(images.shape) + noise, 0, 1)


def _train() -> Any:
    images, labels = open_source("digits", "train").read(np.arange(1500))
    images = images[..., 0].astype(np.float32) / 255
    optimizer = optax.adamw(optax.cosine_decay_schedule(2e-3, STEPS), weight_decay=1e-2)
    params = DigitsClassifier().init(jax.random.key(0), images[:1])

    @jax.jit
    def step(params: Any, state: Any, key: jax.Array, images: jax.Array, labels: jax.Array) -> tuple[Any, Any]:
        def loss(params: Any) -> jax.Array:
            logits = DigitsClassifier().apply(params, augmented(key, images))
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state, random = optimizer.init(params), np.random.default_rng(0)
    for i in range(STEPS):
        rows = random.integers(0, len(images), BATCH_SIZE)
        params, state = step(params, state, jax.random.key(i), images[rows], labels[rows])
    return params


@functools.cache
def trained_classifier() -> tuple[Callable[[Any], np.ndarray], float]:
    """Returns a function from uint8 images [N, 8, 8, 1] to labels [N], and its accuracy on the 297 test images."""
    params = DigitsClassifier().init(jax.random.key(0), jnp.zeros((1, 8, 8)))
    if CACHE.exists():
        params = flax.serialization.from_bytes(params, CACHE.read_bytes())
    else:
        params = _train()
        CACHE.parent.mkdir(parents=True, exist_ok=True)
        CACHE.write_bytes(flax.serialization.to_bytes(params))
    apply = jax.jit(DigitsClassifier().apply)

    def read(images: Any) -> np.ndarray:
        return np.asarray(apply(params, np.asarray(images)[..., 0].astype(np.float32) / 255).argmax(-1))

    images, labels = open_source("digits", "test").read(np.arange(297))
    return read, float((read(images) == labels).mean())


def reads(pipe: TarFlowPipeline) -> dict[str, float]:
    """Returns the classifier's accuracy, and the fractions of a model's samples that it assigns to their label."""
    read, accuracy = trained_classifier()
    labels = np.arange(SAMPLES, dtype=np.int32) % 10
    latents = pipe.latents(jax.random.key(1), SAMPLES)

    def share(images: Any) -> float:
        return float((read(to_uint8(images)) == labels).mean())

    raw = pipe.decode(latents, labels)
    figures = {
        "classifier_accuracy": accuracy,
        "read_raw": share(raw),
        "read_denoised": share(pipe.denoise(raw, labels)),
    }
    for weight in (1.0, 2.0):
        guided = pipe.decode(latents, labels, Guidance(weight))
        figures[f"read_guided_{weight:g}"] = share(pipe.denoise(guided, labels))
    if pipe.student is not None:
        denoised = np.asarray(pipe.denoise(raw, labels), np.float64)
        for weight in (0.0, 1.0, 2.0):
            drawn = pipe.decode(latents, labels, Guidance(weight), decoder=Student())
            figures[f"read_student_{weight:g}"] = share(drawn)
            if not weight:
                pair = (np.asarray(drawn, np.float64) - denoised.mean(0)).ravel(), (denoised - denoised.mean(0)).ravel()
                figures["student_correlation"] = float(np.corrcoef(*pair)[0, 1])
    return figures


if __name__ == "__main__":
    for workdir in sys.argv[1:]:
        print(json.dumps({"workdir": workdir, **reads(TarFlowPipeline.from_pretrained(workdir))}), flush=True)
