"""Measures a trained model: likelihood, distances of its samples to the data, and the flow as a classifier.

    python -m launch.evaluate --workdir=runs/fashion_mnist --metrics=bits_per_dim
    python -m launch.evaluate --workdir=DIR --metrics=fid,precision_recall --guidance=0,1,2 --denoise=false,true

Prints tables, and writes them with their protocol to DIR/evaluation/. What each metric is: docs/evaluation.md.
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from launch import common, end_at_signals
from launch.evaluate_samples import DENOISE, GUIDANCE, check_samples, measure_samples
from launch.evaluate_student import measure_student
from launch.evaluate_subject import NOISE_STD, SEED, UNKNOWN_LEVELS, Subject, level_of, open_subject
from tarflow_jax.arguments import check_student
from tarflow_jax.data import open_source
from tarflow_jax.errors import UserError
from tarflow_jax.evaluation import classification, distances
from tarflow_jax.evaluation.bits_per_dim import BitsPerDim, image_bits_per_dim
from tarflow_jax.evaluation.report import format_protocol, format_table, write_json
from tarflow_jax.evaluation.split import split_log_prob
from tarflow_jax.noise import to_float
from tarflow_jax.runtime import BatchRunner, LazyRows, environment, make_mesh

ALL_METRICS = ("bits_per_dim", *distances.METRICS, "classification", "outliers", "student")
TUNING_LEVELS, TUNING_IMAGES = 8, 500  # to find the best level for classification

METRICS = flags.DEFINE_list(
    "metrics",
    ["bits_per_dim"],
    "Measure these: bits_per_dim, fid, sfid, inception_score, kid, precision_recall, classification, outliers, "
    "student.",
)
SPLIT = flags.DEFINE_string(
    "split", "test", "Measure likelihood, classification and outliers on this split of the data."
)
ALLOW_NOISY = flags.DEFINE_bool("allow_noisy", False, "Report nats/dim of noisy data for Gaussian training noise.")
DRAWS = flags.DEFINE_integer("dequantisation_draws", 1, "Take the importance-weighted bound of K draws.", lower_bound=1)
CLASSIFICATION_DRAWS = flags.DEFINE_integer(
    "classification_draws", 1, "Classify by the mean of log p over K draws of the training noise.", lower_bound=1
)
OUTLIERS = flags.DEFINE_string("outliers", None, "Take this data set's images for outliers.")
common.define_process_flags()


def measure_likelihood(subject: Subject) -> dict[str, Any]:
    """Bits per dimension, or for Gaussian training noise what may be said in its place."""
    runner = BatchRunner(make_mesh())  # of all processes, which share the split
    pipe, source = subject.pipe, subject.source(SPLIT.value)
    variables, key = runner.place(pipe.variables), jax.random.key(SEED.value)
    level = level_of(pipe)
    levels = None if level is None else np.array([level], np.float32)
    if pipe.noise_std is None:
        images = LazyRows(source.read, len(source))
        bits = BitsPerDim.of(image_bits_per_dim(runner, pipe.config, variables, images, key, DRAWS.value, levels))
        found = {"bits/dim": bits.mean, "standard error": bits.standard_error, "images": bits.num_images}
        return found | {"dequantisation draws": DRAWS.value, "precision": "float32, full matmul"}
    log_probs = split_log_prob(runner, pipe.config, variables, source, pipe.noise, key, levels)
    nats = -log_probs.astype(np.float64) / pipe.config.num_dims
    error = float(nats.std(ddof=1) / np.sqrt(len(nats)))
    found = {"nats/dim of noisy data": float(nats.mean()), "standard error": error, "images": len(nats)}
    return found if level is None else found | {"noise level": level}


def check_metrics(subject: Subject, metrics: Sequence[str]) -> None:
    """Raises ValueError, before hours of work, for what a metric would be refused for after them."""
    pipe, of_samples = subject.pipe, [metric for metric in metrics if metric in distances.METRICS]
    if "bits_per_dim" in metrics and pipe.noise_std is not None and not ALLOW_NOISY.value:
        raise UserError(
            "bits/dim is defined for models trained with uniform noise, this one's was gaussian; "
            "train with noise.kind=uniform, or pass --allow_noisy for nats/dim of noisy data"
        )
    if NOISE_STD.value is not None and not pipe.config.noise_conditional:
        raise UserError("--noise_std is for models of many noise levels; this one is of a single level")
    if "classification" in metrics and not pipe.config.num_classes:
        raise UserError("classification needs a class-conditional model, this one has no classes")
    if "student" in metrics:
        check_student(pipe.student)
    if "outliers" in metrics and OUTLIERS.value is None:
        raise UserError("outliers needs a second data set, --outliers=NAME")
    if of_samples:
        check_samples(pipe, of_samples)
    subject.source(SPLIT.value)


def noisy_images(subject: Subject, images: np.ndarray, key: jax.Array, level: float | None) -> jax.Array:
    """Images [N, H, W, K] as the model has seen them in training, of many levels at `level`; float32."""
    noise = subject.pipe.noise
    if noise is None:
        return to_float(jnp.asarray(images))
    return noise(key, jnp.asarray(images), None if level is None else jnp.full(len(images), level))


def class_log_probs(subject: Subject, images: np.ndarray, level: float | None, draws: int = 1) -> np.ndarray:
    """log p(x | y) in nats of 8-bit images under every label, the mean over draws of noise: float64 [N, classes]."""
    first = jax.random.key(SEED.value)
    keys = [first, *(jax.random.fold_in(first, draw) for draw in range(1, draws))]
    log_prob, classes = functools.partial(subject.pipe.log_prob, noise_std=level), subject.pipe.config.num_classes
    of_draws = [
        classification.class_log_probs(log_prob, noisy_images(subject, images, key, level), classes) for key in keys
    ]
    return np.mean(of_draws, axis=0)


def best_level(subject: Subject) -> float:
    """The noise level at which Bayes' rule reads most of some training images right."""
    if subject.pipe.noise is None:
        raise UserError(UNKNOWN_LEVELS)
    source = subject.source("train")
    images, labels = source.read(np.arange(min(len(source), TUNING_IMAGES)))
    levels = [float(level) for level in subject.pipe.noise.quantiles(TUNING_LEVELS)]
    right = [(class_log_probs(subject, images, level).argmax(1) == labels).sum() for level in levels]
    return levels[int(np.argmax(right))]


def measure_classification(subject: Subject) -> dict[str, Any]:
    """Bayes' rule over the split."""
    source = subject.source(SPLIT.value)
    if not source.num_classes:
        raise UserError(f"{source.name} has no labels; classification needs them")
    images, labels = source.read(np.arange(len(source)))
    level = NOISE_STD.value
    if level is None and subject.pipe.config.noise_conditional:
        level = best_level(subject)
    log_probs = class_log_probs(subject, images, level, CLASSIFICATION_DRAWS.value)
    found = classification.bayes_classification(log_probs, labels) | {"draws": CLASSIFICATION_DRAWS.value}
    return found if level is None else found | {"noise_level": level}


def measure_outliers(subject: Subject) -> dict[str, Any]:
    """log p, without labels, of the split against the same split of --outliers."""
    inside, outside = (
        subject.source(SPLIT.value),
        open_source(OUTLIERS.value, SPLIT.value, data_dir=subject.data_dir),
    )
    log_probs, level = [], level_of(subject.pipe)
    for source, key in zip((inside, outside), jax.random.split(jax.random.key(SEED.value)), strict=True):
        images = classification.fit_images(source.read(np.arange(len(source)))[0], subject.pipe.config.image_shape)
        noisy = noisy_images(subject, images, key, level)
        log_probs.append(np.asarray(subject.pipe.log_prob(noisy, noise_std=level)))
    return classification.outlier_scores(*log_probs, subject.pipe.config.num_dims)


def main(argv: Sequence[str]) -> None:
    """Measures, prints, writes."""
    metrics = list(dict.fromkeys(METRICS.value))
    if unknown := [metric for metric in metrics if metric not in ALL_METRICS]:
        raise UserError(f"unknown metric {unknown[0]!r}; expected some of {', '.join(ALL_METRICS)}")
    if not metrics:
        raise UserError(f"--metrics is empty; expected some of {', '.join(ALL_METRICS)}")
    common.join_processes()
    end_at_signals()  # JAX may have taken SIGTERM
    subject = open_subject()
    check_metrics(subject, metrics)
    results: dict[str, Any] = {}
    protocol = subject.protocol | {"split": SPLIT.value}
    measures = {
        "bits_per_dim": measure_likelihood,
        "classification": measure_classification,
        "outliers": measure_outliers,
        "student": measure_student,
    }
    for metric in metrics:
        if metric in measures:
            results[metric] = measures[metric](subject)
            row = {k: v for k, v in results[metric].items() if not isinstance(v, list)}
            if jax.process_index() == 0:
                print(format_table(results[metric].get("rows", [row])), flush=True)
    if of_samples := [metric for metric in metrics if metric in distances.METRICS]:
        results["samples"], more = measure_samples(subject, of_samples)
        protocol |= more
    if jax.process_index() == 0:
        if of_samples:
            print(format_table(results["samples"]))
        print(format_protocol(protocol))
        name = hashlib.sha256(json.dumps([protocol, GUIDANCE.value, DENOISE.value]).encode()).hexdigest()[:8]
        path = subject.out / f"{'+'.join(metrics)}-{SPLIT.value}-{name}.json"
        write_json(path, {"protocol": protocol, "results": results, "environment": environment()})
        print(path)


if __name__ == "__main__":
    common.run(main)
