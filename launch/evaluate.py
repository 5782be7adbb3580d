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
from etils import epath

from launch import cli, end_at_signals
from launch.evaluate_samples import (
    DENOISE,
    GUIDANCE,
    SEED,
    Evaluation,
    check_samples,
    measure_samples,
    measure_student,
)
from launch.tables import format_protocol, format_table
from tarflow_jax.data import ImageSource, data_folder, open_source
from tarflow_jax.errors import UserError
from tarflow_jax.evaluation import classification, distances
from tarflow_jax.evaluation.bits_per_dim import image_bits_per_dim, noisy_log_prob
from tarflow_jax.files import write_text
from tarflow_jax.fingerprint import fingerprint
from tarflow_jax.noise import to_float
from tarflow_jax.pipeline import TarFlowPipeline
from tarflow_jax.runtime import BatchRunner, environment, make_mesh
from tarflow_jax.training import Recipe

ALL_METRICS = ("bits_per_dim", *distances.METRICS, "classification", "outliers", "student")
NUM_CANDIDATES, TUNING_IMAGES = 8, 500  # to find the noise level that classifies best

WORKDIR = flags.DEFINE_string("workdir", None, "Run directory of the model.")
MODEL = flags.DEFINE_string("model", None, "Saved model instead of --workdir, by its folder or hub name.")
DATA = flags.DEFINE_string("data", None, "Data set; default: the one the run was trained on.")
PREPROCESSING = flags.DEFINE_string("preprocessing", None, "Preprocessing of --data: none, tarflow or adm.")
OUT = flags.DEFINE_string("out", None, "Folder for the results; default: WORKDIR/evaluation or ./evaluation.")
METRICS = flags.DEFINE_list(
    "metrics",
    ["bits_per_dim"],
    "Metrics: bits_per_dim, fid, sfid, inception_score, kid, precision_recall, classification, outliers, student.",
)
SPLIT = flags.DEFINE_string("split", "test", "Split for likelihood, classification and outliers.")
NOISE_STD = flags.DEFINE_float(
    "noise_std", None, "Noise level σ of a noise-conditional model; default: the lowest, or best."
)
ALLOW_NOISY = flags.DEFINE_bool("allow_noisy", False, "Report nats/dim of noisy data for Gaussian training noise.")
DRAWS = flags.DEFINE_integer("dequantisation_draws", 1, "Draws K in the importance-weighted bound.", lower_bound=1)
CLASSIFICATION_DRAWS = flags.DEFINE_integer(
    "classification_draws", 1, "Number of draws of training noise to average log p over.", lower_bound=1
)
OUTLIERS = flags.DEFINE_string("outliers", None, "Out-of-distribution data set.")
cli.define_checkpoint_flag()
cli.define_process_flags()


def open_evaluation() -> Evaluation:
    """Opens what --workdir or --model, and --data, name; the model runs on the devices of this process."""
    if (WORKDIR.value is None) == (MODEL.value is None):
        raise UserError("expected one of --workdir and --model")
    workdir = None if WORKDIR.value is None else cli.folder("workdir")
    name = workdir or cli.folder("model")
    fields = Recipe.from_workdir(workdir).config.data if workdir else None
    if fields is None and DATA.value is None:
        raise UserError("a saved model does not say what data it was trained on; name it, --data=NAME")
    pipe = cli.open_pipeline(name, make_mesh(devices=jax.local_devices()))
    data = DATA.value or fields.source
    preprocessing = PREPROCESSING.value or (fields.preprocessing if fields else "none")
    data_dir = data_folder(fields.data_dir if fields else None)

    def source(split: str) -> ImageSource:
        found = open_source(
            data,
            split,
            image_size=pipe.config.image_size,
            preprocessing=preprocessing,
            data_dir=data_dir,
            skip_bad=bool(fields and fields.skip_bad),
        )
        if found.image_shape != pipe.config.image_shape:
            raise UserError(f"{data} has images {found.image_shape}, the model {pipe.config.image_shape}")
        return found

    protocol = {
        "model": str(name),
        "fingerprint": fingerprint(pipe.variables),
        "training_noise": "unknown" if pipe.noise is None else str(pipe.noise),
        "data_set": data,
        "preprocessing": preprocessing,
        "compute": pipe.config.dtype,
        "seed": SEED.value,
    }
    out = cli.folder("out") if OUT.value else f"{workdir}/evaluation" if workdir else "evaluation"
    return Evaluation(pipe, source, data_dir, epath.Path(out), protocol)


def check_metrics(evaluation: Evaluation, metrics: Sequence[str]) -> None:
    """Raises UserError for what a metric would reject only after hours of work on others."""
    pipe, of_samples = evaluation.pipe, [metric for metric in metrics if metric in distances.METRICS]
    if "bits_per_dim" in metrics and pipe.noise_std is not None and not ALLOW_NOISY.value:
        raise UserError(
            "bits/dim is defined for models trained with uniform noise, this one's was gaussian; "
            "train with noise.kind=uniform, or pass --allow_noisy for nats/dim of noisy data"
        )
    if NOISE_STD.value is not None and not pipe.config.noise_conditional:
        raise UserError("--noise_std is for noise-conditional models; this one has a single noise level")
    if "classification" in metrics and not pipe.config.num_classes:
        raise UserError("classification needs a class-conditional model, this one has no classes")
    if "student" in metrics:
        pipe.require_student()
    if "outliers" in metrics and OUTLIERS.value is None:
        raise UserError("outliers needs a second data set, --outliers=NAME")
    if of_samples:
        check_samples(pipe, of_samples)
    evaluation.source(SPLIT.value)


def noise_level(pipe: TarFlowPipeline) -> float | None:
    """σ at which a noise-conditional flow is evaluated, --noise_std or the lowest; None for other flows."""
    if not pipe.config.noise_conditional or NOISE_STD.value is not None:
        return NOISE_STD.value
    return training_noise(pipe).std_min


def training_noise(pipe: TarFlowPipeline) -> Any:
    """The noise levels of training; raises UserError where they are unknown."""
    if pipe.noise is None:
        raise UserError("the noise levels of this model are not known; name one, --noise_std=σ")
    return pipe.noise


def measure_likelihood(evaluation: Evaluation) -> dict[str, Any]:
    """Bits per dimension; for Gaussian training noise, nats per dimension of noisy data."""
    runner = BatchRunner(make_mesh())  # over all processes, which share the split
    pipe, source, level = evaluation.pipe, evaluation.source(SPLIT.value), noise_level(evaluation.pipe)
    variables, key = runner.place(pipe.variables), jax.random.key(SEED.value)
    levels = None if level is None else np.array([level], np.float32)
    if pipe.noise_std is None:
        values = image_bits_per_dim(runner, pipe.config, variables, source, key, DRAWS.value, levels)
        unit, more = "bits/dim", {"dequantisation draws": DRAWS.value, "precision": "float32, full matmul"}
    else:
        log_probs = noisy_log_prob(runner, pipe.config, variables, source, pipe.noise, key, levels)
        values = -log_probs.astype(np.float64) / pipe.config.num_dims
        unit, more = "nats/dim of noisy data", {} if level is None else {"noise level": level}
    error = float(values.std(ddof=1) / np.sqrt(len(values)))
    return {unit: float(values.mean()), "standard error": error, "images": len(values)} | more


def noisy_images(pipe: TarFlowPipeline, images: np.ndarray, key: jax.Array, level: float | None) -> jax.Array:
    """8-bit images [N, H, W, K] as float32 with the training noise, at `level` for a noise-conditional flow."""
    if pipe.noise is None:
        return to_float(jnp.asarray(images))
    return pipe.noise(key, jnp.asarray(images), None if level is None else jnp.full(len(images), level))


def mean_class_log_probs(pipe: TarFlowPipeline, images: np.ndarray, level: float | None, draws: int = 1) -> np.ndarray:
    """log p(x | y) in nats of 8-bit images under every label, averaged over draws of noise: float64 [N, C]."""
    first = jax.random.key(SEED.value)
    keys = [first, *(jax.random.fold_in(first, draw) for draw in range(1, draws))]
    log_prob, num_classes = functools.partial(pipe.log_prob, noise_std=level), pipe.config.num_classes
    noisy = (noisy_images(pipe, images, key, level) for key in keys)
    return np.mean([classification.class_log_probs(log_prob, x, num_classes) for x in noisy], axis=0)


def best_level(evaluation: Evaluation) -> float:
    """The noise level, of several, at which Bayes' rule classifies some training images best."""
    levels = [float(level) for level in training_noise(evaluation.pipe).quantiles(NUM_CANDIDATES)]
    source = evaluation.source("train")
    images, labels = source.read(np.arange(min(len(source), TUNING_IMAGES)))
    correct = [(mean_class_log_probs(evaluation.pipe, images, level).argmax(1) == labels).sum() for level in levels]
    return levels[int(np.argmax(correct))]


def measure_classification(evaluation: Evaluation) -> dict[str, Any]:
    """Bayes' rule over the split."""
    source, level = evaluation.source(SPLIT.value), NOISE_STD.value
    if not source.num_classes:
        raise UserError(f"{source.name} has no labels; classification needs them")
    images, labels = source.read(np.arange(len(source)))
    if level is None and evaluation.pipe.config.noise_conditional:
        level = best_level(evaluation)
    log_probs = mean_class_log_probs(evaluation.pipe, images, level, CLASSIFICATION_DRAWS.value)
    found = classification.bayes_classification(log_probs, labels) | {"draws": CLASSIFICATION_DRAWS.value}
    return found if level is None else found | {"noise_level": level}


def measure_outliers(evaluation: Evaluation) -> dict[str, Any]:
    """Unconditional log p of the split against that of the same split of --outliers."""
    pipe, level = evaluation.pipe, noise_level(evaluation.pipe)
    outside = open_source(OUTLIERS.value, SPLIT.value, data_dir=evaluation.data_dir)
    keys, log_probs = jax.random.split(jax.random.key(SEED.value)), []
    for source, key in zip((evaluation.source(SPLIT.value), outside), keys, strict=True):
        images = classification.fit_images(source.read(np.arange(len(source)))[0], pipe.config.image_shape)
        log_probs.append(np.asarray(pipe.log_prob(noisy_images(pipe, images, key, level), noise_std=level)))
    return classification.outlier_scores(*log_probs, pipe.config.num_dims)


MEASURES = {
    "bits_per_dim": measure_likelihood,
    "classification": measure_classification,
    "outliers": measure_outliers,
    "student": measure_student,
}


def main(argv: Sequence[str]) -> None:
    """Measures, prints, writes."""
    metrics = list(dict.fromkeys(METRICS.value))
    if unknown := [metric for metric in metrics if metric not in ALL_METRICS]:
        raise UserError(f"unknown metric {unknown[0]!r}; expected some of {', '.join(ALL_METRICS)}")
    if not metrics:
        raise UserError(f"--metrics is empty; expected some of {', '.join(ALL_METRICS)}")
    cli.join_processes()
    end_at_signals()  # JAX may have taken SIGTERM
    evaluation = open_evaluation()
    check_metrics(evaluation, metrics)
    results: dict[str, Any] = {}
    protocol = evaluation.protocol | {"split": SPLIT.value}
    for metric in metrics:
        if metric in MEASURES:
            results[metric] = MEASURES[metric](evaluation)
            row = {k: v for k, v in results[metric].items() if not isinstance(v, list)}
            if jax.process_index() == 0:
                print(format_table(results[metric].get("rows", [row])), flush=True)
    if of_samples := [metric for metric in metrics if metric in distances.METRICS]:
        results["samples"], more = measure_samples(evaluation, of_samples)
        protocol |= more
    if jax.process_index() == 0:
        if of_samples:
            print(format_table(results["samples"]))
        print(format_protocol(protocol))
        name = hashlib.sha256(json.dumps([protocol, GUIDANCE.value, DENOISE.value]).encode()).hexdigest()[:8]
        path = evaluation.out / f"{'+'.join(metrics)}-{SPLIT.value}-{name}.json"
        content = {"protocol": protocol, "results": results, "environment": environment()}
        write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        print(path)


if __name__ == "__main__":
    cli.run(main)
