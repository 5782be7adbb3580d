"""The metrics of launch.evaluate that draw images: distances of samples to the data, and a student against its flow."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath
from jax.experimental import multihost_utils

from launch import cli
from tarflow_jax.data import ImageSource
from tarflow_jax.errors import UserError
from tarflow_jax.evaluation import distances, generation
from tarflow_jax.evaluation.classifier import classifier_network
from tarflow_jax.evaluation.inception import inception_network
from tarflow_jax.fingerprint import fingerprint
from tarflow_jax.pipeline import TarFlowPipeline, check_student_guidance
from tarflow_jax.sampling import Guidance, Jacobi, Sequential, Student

CHUNK_SIZE = 500
NUM_FEATURES = {"inception": 2048, "classifier": 128}
STUDENT_LATENTS, JACOBI_LATENTS = 1000, 100
POLISHES = (1, 2, 4)

SEED = cli.define_seed("Seed of the noise and the samples.")
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 50_000, "Number of samples for each setting.", lower_bound=2)
GUIDANCE = flags.DEFINE_list("guidance", ["0"], "Guidance weights w, one setting each.")
DENOISE = flags.DEFINE_list(
    "denoise", None, "Whether to denoise: true, false or both; default: true for Gaussian training noise."
)
MULTIPLIER = cli.define_number("denoise_multiplier", 1.0, "Factor of the score in denoising.")
INCEPTION = flags.DEFINE_string("inception", None, "PyTorch file of FID's weights; default: train a classifier.")
REFERENCE = flags.DEFINE_string("reference", None, "File (npz) of reference statistics, instead of a split.")
REFERENCE_SPLIT = flags.DEFINE_enum("reference_split", "train", ["train", "test"], "Split to compare samples with.")
SAVE_SAMPLES = flags.DEFINE_string("save_samples", None, "File (npz, as ADM's) for the last setting's samples.")
cli.define_guidance_flags()
cli.define_decoder_flags()


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What every metric needs: a model, its data, a folder for results, and the protocol that they share."""

    pipe: TarFlowPipeline
    source: Callable[[str], ImageSource]  # by split
    data_dir: Path
    out: epath.Path
    protocol: dict[str, Any]


def check_samples(pipe: TarFlowPipeline, metrics: Sequence[str]) -> None:
    """Raises UserError for flags that would fail only after hours of drawing."""
    network = "inception" if INCEPTION.value else "classifier"
    distances.check_metrics(list(metrics), network)
    needed = NUM_FEATURES[network]
    if {"fid", "sfid"} & set(metrics) and NUM_SAMPLES.value < needed:
        raise UserError(f"--num_samples is {NUM_SAMPLES.value}; a Fréchet distance needs at least {needed}")
    for guidance, _ in sample_settings(pipe):
        checked = guidance.checked_for(pipe.config)
        if cli.draws_clean_images():
            check_student_guidance(pipe.require_student().config, checked)


def sample_settings(pipe: TarFlowPipeline) -> list[tuple[Guidance, bool]]:
    """Every --guidance with every --denoise."""
    words = DENOISE.value or ["true" if pipe.noise_std is not None else "false"]
    if cli.draws_clean_images():
        if "false" in (DENOISE.value or ()):
            raise UserError(
                "--denoise=false is not for --decoder=student, whose images are clean; with --polish they are not"
            )
        words = ["true"]
    if set(words) - {"true", "false"}:
        raise UserError(f"--denoise has {','.join(words)!r}; expected true, false, or false,true")
    try:
        weights = [float(weight) for weight in GUIDANCE.value]
    except ValueError:
        raise UserError(f"--guidance has {','.join(GUIDANCE.value)!r}; expected numbers") from None
    return [(cli.guidance(weight), word == "true") for weight, word in itertools.product(weights, words)]


def measure_samples(evaluation: Evaluation, metrics: list[str]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Returns a row for each setting of guidance and denoising, and the protocol that the rows share."""
    pipe, cache_dir = evaluation.pipe, evaluation.data_dir / "evaluation"
    source = evaluation.source(REFERENCE_SPLIT.value)
    counts, labels = label_counts(pipe.config.num_classes, source)
    settings = sample_settings(pipe)
    folders = [draw(evaluation, guidance, denoise, counts) for guidance, denoise in settings]
    if jax.process_index():
        return [], {}
    if INCEPTION.value:
        network = inception_network(INCEPTION.value)
    else:
        network = classifier_network(evaluation.source("train"), evaluation.source("test"), cache_dir)
    if REFERENCE.value:
        reference = distances.file_reference(network, REFERENCE.value, metrics)
    else:
        preprocessing = evaluation.protocol["preprocessing"]
        reference = distances.data_set_reference(network, source, REFERENCE_SPLIT.value, preprocessing, cache_dir)
    rows = []
    for (guidance, denoise), folder in zip(settings, folders, strict=True):
        samples = generation.read_chunks(folder, NUM_SAMPLES.value, CHUNK_SIZE, counts)
        row = {"guidance": guidance.weight, "denoised": denoise, "not finite": samples.num_not_finite}
        features = network(samples.images, f"features, guidance {guidance.weight:g}")
        rows.append(row | distances.sample_metrics(metrics, network.name, features, reference))
    if SAVE_SAMPLES.value:
        generation.write_samples(SAVE_SAMPLES.value, samples.images, samples.labels)
    protocol = {
        "num_samples": NUM_SAMPLES.value,
        "labels": labels,
        "decoder": "sequential",
        **decoder_protocol(pipe),
        **{name: flags.FLAGS[name].value for name in cli.GUIDANCE_FLAGS},
        "denoise_multiplier": MULTIPLIER.value,
        "network": f"{network.name}, {network.identity}",
        "reference": reference.protocol,
    }
    return rows, protocol


def label_counts(num_classes: int, reference: ImageSource) -> tuple[np.ndarray, str]:
    """Returns in which proportion samples have each label, as integers [C] without a common divisor, and in words.

    It is that of the reference split where known: otherwise a distance would measure the labels, not the images.
    """
    if not num_classes:
        return np.zeros(0, np.int64), "none"
    if not REFERENCE.value:
        counts = reference.class_counts()
        if len(counts) == num_classes and counts.any():
            return counts // np.gcd.reduce(counts), "as often as in the reference split"
    return np.ones(num_classes, np.int64), "in turn"


def decoder_protocol(pipe: TarFlowPipeline) -> dict[str, Any]:
    """The protocol's entries for --decoder; none for the sequential one."""
    name, decoder = flags.FLAGS.decoder, cli.decoder()
    if isinstance(decoder, Sequential):
        return {}
    if not isinstance(decoder, Student):
        return {"decoder": name}
    weights = fingerprint(pipe.require_student().variables)
    return {"decoder": f"student, polish {decoder.polish}" if decoder.polish else name, "student": weights}


def draw(evaluation: Evaluation, guidance: Guidance, denoise: bool, counts: np.ndarray) -> epath.Path:
    """Draws a setting's missing samples; returns their folder when all processes are done."""
    pipe = evaluation.pipe
    protocol = {
        **{name: evaluation.protocol[name] for name in ("fingerprint", "seed", "compute")},
        "guidance": dataclasses.asdict(guidance) if guidance.weight else None,
        "denoise": MULTIPLIER.value if denoise else None,
        "chunk_size": CHUNK_SIZE,
        "class_counts": counts.tolist(),
        **decoder_protocol(pipe),
    }
    folder = generation.chunk_folder(evaluation.out / "samples", protocol)

    def sample(key: jax.Array, number: int, labels: jax.Array | None) -> jax.Array:
        return pipe.sample(key, number, labels, guidance, denoise, MULTIPLIER.value, cli.decoder())

    generation.generate(sample, folder, NUM_SAMPLES.value, CHUNK_SIZE, counts, SEED.value)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"samples in {folder}")
    return folder


def measure_student(evaluation: Evaluation) -> dict[str, Any]:
    """Compares a student's images of given latents with the flow's own, by the flow's latents and log p, unguided.

    Returns a row for each way from the latents to an image, and how many updates parallel decoding then takes.
    """
    pipe = evaluation.pipe
    key, latents = jax.random.key(SEED.value), pipe.latents(jax.random.key(SEED.value), STUDENT_LATENTS)
    labels = cli.example_labels(pipe.config.num_classes, STUDENT_LATENTS)
    decode = functools.partial(pipe.decode, noise_std=pipe.drawn_level)
    noisy = {"exact": decode(latents, labels)}
    for polish in POLISHES:
        noisy[f"student, polish {polish}"] = decode(latents, labels, decoder=Student(polish))
    clean = {} if pipe.noise_std is None else {"exact, denoised": pipe.denoise_drawn(noisy["exact"], labels)}
    clean["student"] = pipe.decode(latents, labels, decoder=Student())
    target, target_images = next(iter(clean.items()))
    rows = []
    for name, images in (noisy | clean).items():
        row: dict[str, Any] = {"images": name}
        errors = np.abs(np.asarray(pipe.encode(images, labels, pipe.drawn_level)[0]) - np.asarray(latents))
        row["latents off by (root mean square)"] = float(np.sqrt(np.square(errors).mean()))
        row["at most"] = float(errors.max())
        row["nats/dim"] = row["nats/dim with noise"] = _nats_per_dim(pipe, images, labels)
        if name in clean and pipe.noise_std is not None:
            noise = pipe.noise_std * jax.random.normal(jax.random.fold_in(key, 1), images.shape)
            row["nats/dim with noise"] = _nats_per_dim(pipe, jnp.asarray(images) + noise, labels)
        row[f"correlation with {target}"] = _correlation(images, target_images)
        rows.append(row)
    few = None if labels is None else labels[:JACOBI_LATENTS]
    updates = {}
    for init in ("latents", "student"):
        decoder = Jacobi(init=init)
        trace = pipe.decode_trace(latents[:JACOBI_LATENTS], few, decoder=decoder, noise_std=pipe.drawn_level)
        updates[f"Jacobi from the {init}"] = np.asarray(trace.updates).mean(0).tolist()
    return {"rows": rows, "latents": STUDENT_LATENTS, "updates by block": updates}


def _nats_per_dim(pipe: TarFlowPipeline, images: jax.Array, labels: Any) -> float:
    log_prob = np.asarray(pipe.log_prob(images, labels, pipe.drawn_level), np.float64)
    return float(-log_prob.mean() / pipe.config.num_dims)


def _correlation(images: jax.Array, others: jax.Array) -> float:
    """Correlation of the pixels, after subtracting the mean of `others`."""
    first, second = (np.asarray(x, np.float64) - np.asarray(others, np.float64).mean(0) for x in (images, others))
    return float((first * second).sum() / np.sqrt(np.square(first).sum() * np.square(second).sum()))
