"""What launch.evaluate measures of a student: how near its images are to the flow's own, by the flow itself."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from launch import common
from launch.evaluate_subject import SEED, Subject
from tarflow_jax.arguments import check_student
from tarflow_jax.pipeline import TarFlowPipeline
from tarflow_jax.sampling import Jacobi

NUM_LATENTS, NUM_INVERTED = 1000, 100
POLISHES = (1, 2, 4)


def measure_student(subject: Subject) -> dict[str, Any]:
    """A row for each way from the same latents to an image, unguided; and the updates of the parallel inverse."""
    pipe, key = subject.pipe, jax.random.key(SEED.value)
    check_student(pipe.student)
    latents = pipe.latents(key, NUM_LATENTS)
    labels, level = common.example_labels(pipe.config.num_classes, NUM_LATENTS), pipe.drawn_level
    noisy = {"exact": pipe.decode(latents, labels, noise_std=level)}
    clean = {}
    if pipe.noise_std is not None:
        clean["exact, denoised"] = pipe.denoise_drawn(noisy["exact"], labels)
    clean["student"] = pipe.decode(latents, labels, decoder="student")
    noisy |= {
        f"student, polish {count}": pipe.decode(latents, labels, decoder="student", polish=count, noise_std=level)
        for count in POLISHES
    }
    noise_key = jax.random.fold_in(key, 1)
    rows = [
        {"images": name} | _row(pipe, images, latents, labels, noise_key if name in clean else None)
        for name, images in (noisy | clean).items()
    ]
    judge = next(iter(clean.values()))
    for row, images in zip(rows, (noisy | clean).values(), strict=True):
        row["correlation with " + next(iter(clean))] = _correlation(images, judge)
    updates = {f"Jacobi from the {init}": _updates(pipe, latents, labels, init) for init in ("latents", "student")}
    return {"rows": rows, "latents": NUM_LATENTS, "updates by block": updates}


def _row(pipe: TarFlowPipeline, images: jax.Array, latents: jax.Array, labels: Any, key: Any) -> dict[str, Any]:
    """Distances of the images' latents from `latents`, and log p; of clean ones, `key` given, with noise too."""
    level = pipe.drawn_level
    found, _ = pipe.encode(images, labels, level)
    off = np.abs(np.asarray(found) - np.asarray(latents))
    row: dict[str, Any] = {
        "latents off by (root mean square)": float(np.sqrt(np.square(off).mean())),
        "at most": float(off.max()),
        "nats/dim": _nats(pipe, images, labels),
    }
    row["nats/dim with noise"] = row["nats/dim"]
    if key is not None and pipe.noise_std is not None:
        noise = pipe.noise_std * jax.random.normal(key, images.shape)
        row["nats/dim with noise"] = _nats(pipe, jnp.asarray(images) + noise, labels)
    return row


def _nats(pipe: TarFlowPipeline, images: jax.Array, labels: Any) -> float:
    """-log p a dimension, the mean over images."""
    log_prob = np.asarray(pipe.log_prob(images, labels, pipe.drawn_level), np.float64)
    return float(-log_prob.mean() / pipe.config.num_dims)


def _correlation(images: jax.Array, others: jax.Array) -> float:
    """Of the pixels, about the mean image."""
    first, second = (np.asarray(x, np.float64) - np.asarray(others, np.float64).mean(0) for x in (images, others))
    return float((first * second).sum() / np.sqrt(np.square(first).sum() * np.square(second).sum()))


def _updates(pipe: TarFlowPipeline, latents: jax.Array, labels: Any, init: str) -> list[float]:
    """Mean updates that each block takes to the default tolerance, by block number."""
    labels = None if labels is None else labels[:NUM_INVERTED]
    _, (iterations, _) = pipe.decode(
        latents[:NUM_INVERTED],
        labels,
        decoder=Jacobi(init=init),
        noise_std=pipe.drawn_level,
        return_statistics=True,
    )
    return np.asarray(iterations).mean(1).tolist()
