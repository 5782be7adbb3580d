"""Measures a trained model: likelihood, distances of its samples to the data, and the flow as a classifier.

    python -m launch.evaluate --workdir=runs/fashion_mnist --metrics=bits_per_dim
    python -m launch.evaluate --workdir=DIR --metrics=fid,precision_recall --guidance=0,1,2 --denoise=false,true

What each metric is, and what it compares with: docs/evaluation.md. Prints tables and writes them with their protocol
to DIR/evaluation/.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath
from jax.experimental import multihost_utils

from launch import common, end_at_signals
from tarflow_jax.arguments import check_guidance
from tarflow_jax.data import ImageSource, default_data_dir, open_source
from tarflow_jax.errors import UserError
from tarflow_jax.evaluation import classification, distances, generation
from tarflow_jax.evaluation.bits_per_dim import BitsPerDim, image_bits_per_dim
from tarflow_jax.evaluation.classifier import classifier_network
from tarflow_jax.evaluation.features import FeatureExtractor
from tarflow_jax.evaluation.inception import inception_network
from tarflow_jax.evaluation.report import format_protocol, format_table, write_json
from tarflow_jax.evaluation.sample_files import write_samples
from tarflow_jax.evaluation.split import split_log_prob
from tarflow_jax.fingerprint import fingerprint
from tarflow_jax.noise import to_float
from tarflow_jax.pipeline import TarFlowPipeline
from tarflow_jax.runtime import BatchRunner, LazyRows, environment, make_mesh
from tarflow_jax.sampling import Guidance
from tarflow_jax.training import Recipe

ALL_METRICS = ("bits_per_dim", *distances.METRICS, "classification", "outliers")
CHUNK_SIZE = 500
UNKNOWN_LEVELS = "the noise levels of this model are not known; name one, --noise_std=σ"
TUNING_LEVELS, TUNING_IMAGES = 8, 500  # to find the best level for classification
NUM_FEATURES = {"inception": 2048, "classifier": 128}

WORKDIR = flags.DEFINE_string("workdir", None, "Measure the model of this training run's folder.")
MODEL = flags.DEFINE_string(
    "model", None, "Measure this saved model, by its folder or hub name, in place of --workdir."
)
DATA = flags.DEFINE_string("data", None, "Measure on this data set; on the one the run was trained on if not given.")
PREPROCESSING = flags.DEFINE_string("preprocessing", None, "Prepare --data this way: none, tarflow or adm.")
METRICS = flags.DEFINE_list(
    "metrics",
    ["bits_per_dim"],
    "Measure these: bits_per_dim, fid, sfid, inception_score, kid, precision_recall, classification, outliers.",
)
SPLIT = flags.DEFINE_string(
    "split", "test", "Measure likelihood, classification and outliers on this split of the data."
)
SEED = common.define_seed("Draw noise and samples from this seed.")
OUT = flags.DEFINE_string(
    "out", None, "Write the results to this folder; to WORKDIR/evaluation or ./evaluation if not given."
)
ALLOW_NOISY = flags.DEFINE_bool("allow_noisy", False, "Report nats/dim of noisy data for Gaussian training noise.")
DRAWS = flags.DEFINE_integer("dequantisation_draws", 1, "Take the importance-weighted bound of K draws.", lower_bound=1)
OUTLIERS = flags.DEFINE_string("outliers", None, "Take this data set's images for outliers.")
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 50_000, "Draw this many samples for each setting.", lower_bound=2)
GUIDANCE = flags.DEFINE_list("guidance", ["0"], "Guide with these weights, each a setting of its own.")
common.define_guidance_flags()
NOISE_STD = flags.DEFINE_float(
    "noise_std", None, "Ask a model of many noise levels at this σ; at the lowest, or the best one, if not given."
)
DENOISE = flags.DEFINE_list(
    "denoise", None, "Denoise: true, false or both; if not given, true for Gaussian training noise."
)
MULTIPLIER = common.define_number("denoise_multiplier", 1.0, "Multiply the score by s in denoising.")
INCEPTION = flags.DEFINE_string(
    "inception", None, "Read FID's weights from this PyTorch file; train a classifier in its place if not given."
)
REFERENCE = flags.DEFINE_string(
    "reference", None, "Compare with the statistics in this npz file, in place of a split's own."
)
REFERENCE_SPLIT = flags.DEFINE_string("reference_split", "train", "Compare samples with this split.")
SAVE_SAMPLES = flags.DEFINE_string(
    "save_samples", None, "Write the samples of the last setting to this npz file, in ADM's format."
)
common.define_checkpoint_flag()
common.define_process_flags()


@dataclasses.dataclass(frozen=True)
class Subject:
    """The model, its data by split, and what to print about both."""

    pipe: TarFlowPipeline
    source: Callable[[str], ImageSource]
    data_dir: Path
    out: epath.Path
    protocol: dict[str, Any]


def open_subject() -> Subject:
    """What --workdir or --model, and --data, name.

    The pipeline runs on the devices of this process: processes share the samples, chunk by chunk.
    """
    if (WORKDIR.value is None) == (MODEL.value is None):
        raise UserError("expected one of --workdir and --model")
    workdir = None if WORKDIR.value is None else common.folder("workdir")
    name = workdir or common.folder("model")
    recipe = Recipe.from_workdir(workdir) if workdir else None
    if recipe is None and DATA.value is None:
        raise UserError("a saved model does not say what data it was trained on; name it, --data=NAME")
    pipe = common.open_pipeline(name, make_mesh(devices=jax.local_devices()))
    fields = recipe.config.data if recipe else None
    data = DATA.value or fields.source
    preprocessing = PREPROCESSING.value or (fields.preprocessing if fields else "none")
    data_dir = Path(fields.data_dir) if fields and fields.data_dir else default_data_dir()
    skip_bad = bool(fields and fields.skip_bad)

    def source(split: str) -> ImageSource:
        found = open_source(
            data,
            split,
            image_size=pipe.config.image_size,
            preprocessing=preprocessing,
            data_dir=data_dir,
            skip_bad=skip_bad,
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
    out = common.folder("out") if OUT.value else f"{workdir}/evaluation" if workdir else "evaluation"
    return Subject(pipe, source, data_dir, epath.Path(out), protocol)


def level_of(pipe: TarFlowPipeline) -> float | None:
    """The noise level that a flow of many is asked at; None for a flow of a single one."""
    if not pipe.config.noise_conditional or NOISE_STD.value is not None:
        return NOISE_STD.value
    if pipe.noise is None:
        raise UserError(UNKNOWN_LEVELS)
    return pipe.noise.std_min


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
    if "outliers" in metrics and OUTLIERS.value is None:
        raise UserError("outliers needs a second data set, --outliers=NAME")
    if of_samples:
        network = "inception" if INCEPTION.value else "classifier"
        distances.check_metrics(of_samples, network)
        needed = NUM_FEATURES[network]
        if {"fid", "sfid"} & set(of_samples) and NUM_SAMPLES.value < needed:
            raise UserError(f"--num_samples is {NUM_SAMPLES.value}; a Fréchet distance needs at least {needed}")
        for guidance, _ in sample_settings(pipe):
            check_guidance(pipe.config, guidance)
    subject.source(SPLIT.value)


def noisy_images(subject: Subject, images: np.ndarray, key: jax.Array, level: float | None) -> jax.Array:
    """Images [N, H, W, K] as the model has seen them in training, of many levels at `level`; float32."""
    noise = subject.pipe.noise
    if noise is None:
        return to_float(jnp.asarray(images))
    return noise(key, jnp.asarray(images), None if level is None else jnp.full(len(images), level))


def class_log_probs(subject: Subject, images: np.ndarray, level: float | None) -> np.ndarray:
    """log p(x | y) in nats of 8-bit images, with noise, under every label: float64 [N, num_classes]."""
    pipe, key = subject.pipe, jax.random.key(SEED.value)
    log_prob = functools.partial(pipe.log_prob, noise_std=level)
    noisy = noisy_images(subject, images, key, level)
    return classification.class_log_probs(log_prob, noisy, pipe.config.num_classes)


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
    found = classification.bayes_classification(class_log_probs(subject, images, level), labels)
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


def measure_samples(subject: Subject, metrics: list[str]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of a table, one a setting of guidance and denoising; and the protocol they share."""
    train, test = subject.source("train"), subject.source("test")
    settings = sample_settings(subject.pipe)
    folders = [draw(subject, guidance, denoise) for guidance, denoise in settings]
    if jax.process_index():
        return [], {}
    if INCEPTION.value:
        network = inception_network(INCEPTION.value)
    else:
        network = classifier_network(train, test, subject.data_dir / "evaluation")
    extractor = FeatureExtractor(network)
    if REFERENCE.value:
        reference = distances.file_reference(extractor, REFERENCE.value, metrics)
    else:
        split, preprocessing = REFERENCE_SPLIT.value, subject.protocol["preprocessing"]
        source = train if split == "train" else test
        reference = distances.data_set_reference(
            extractor, source, split, preprocessing, subject.data_dir / "evaluation"
        )
    rows = []
    for (guidance, denoise), folder in zip(settings, folders, strict=True):
        samples = generation.read_chunks(folder, NUM_SAMPLES.value, CHUNK_SIZE, subject.pipe.config.num_classes)
        row = {"guidance": guidance.weight, "denoised": denoise, "not finite": samples.num_not_finite}
        features = extractor(samples.images, f"features, guidance {guidance.weight:g}")
        rows.append(row | distances.sample_metrics(metrics, network.name, features, reference))
    if SAVE_SAMPLES.value:
        write_samples(SAVE_SAMPLES.value, samples.images, samples.labels)
    protocol = {
        "num_samples": NUM_SAMPLES.value,
        "labels": "in turn" if subject.pipe.config.num_classes else "none",
        "decoder": "sequential",
        **{name: flags.FLAGS[name].value for name in common.GUIDANCE_FLAGS},
        "denoise_multiplier": MULTIPLIER.value,
        "network": f"{network.name}, {network.identity}",
        "reference": reference.protocol,
    }
    return rows, protocol


def sample_settings(pipe: TarFlowPipeline) -> list[tuple[Guidance, bool]]:
    """Every --guidance with every --denoise."""
    words = DENOISE.value or ["true" if pipe.noise_std is not None else "false"]
    if set(words) - {"true", "false"}:
        raise UserError(f"--denoise has {','.join(words)!r}; expected true, false, or false,true")
    try:
        weights = [float(weight) for weight in GUIDANCE.value]
    except ValueError:
        raise UserError(f"--guidance has {','.join(GUIDANCE.value)!r}; expected numbers") from None
    guidances = map(common.guidance, weights)
    return [(guidance, word == "true") for guidance, word in itertools.product(guidances, words)]


def draw(subject: Subject, guidance: Guidance, denoise: bool) -> epath.Path:
    """Draws what is missing of a setting's samples; returns their folder when all processes are done."""
    protocol = {
        **{name: subject.protocol[name] for name in ("fingerprint", "seed", "compute")},
        "guidance": dataclasses.asdict(guidance) if guidance.weight else None,
        "denoise": MULTIPLIER.value if denoise else None,
        "chunk_size": CHUNK_SIZE,
    }
    folder = generation.chunk_folder(subject.out / "samples", protocol)

    def sample(key: jax.Array, number: int, labels: jax.Array | None) -> jax.Array:
        return subject.pipe.sample(key, number, labels, guidance, denoise, MULTIPLIER.value)

    generation.generate(sample, folder, NUM_SAMPLES.value, CHUNK_SIZE, subject.pipe.config.num_classes, SEED.value)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"samples in {folder}")
    return folder


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
    }
    for metric in metrics:
        if metric in measures:
            results[metric] = measures[metric](subject)
            row = {k: v for k, v in results[metric].items() if not isinstance(v, list)}
            if jax.process_index() == 0:
                print(format_table([row]), flush=True)
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
