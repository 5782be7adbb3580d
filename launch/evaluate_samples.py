"""What launch.evaluate measures of samples: draws them, and compares them with the data by a network's features."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath
from jax.experimental import multihost_utils

from launch import common
from launch.evaluate_subject import SEED, Subject
from tarflow_jax.arguments import check_guidance, check_student, check_student_guidance
from tarflow_jax.data import ImageSource
from tarflow_jax.errors import UserError
from tarflow_jax.evaluation import distances, generation
from tarflow_jax.evaluation.classifier import classifier_network
from tarflow_jax.evaluation.features import FeatureExtractor
from tarflow_jax.evaluation.inception import inception_network
from tarflow_jax.evaluation.sample_files import write_samples
from tarflow_jax.fingerprint import fingerprint
from tarflow_jax.pipeline import TarFlowPipeline
from tarflow_jax.sampling import Guidance

CHUNK_SIZE = 500
NUM_FEATURES = {"inception": 2048, "classifier": 128}

NUM_SAMPLES = flags.DEFINE_integer("num_samples", 50_000, "Draw this many samples for each setting.", lower_bound=2)
GUIDANCE = flags.DEFINE_list("guidance", ["0"], "Guide with these weights, each a setting of its own.")
DENOISE = flags.DEFINE_list(
    "denoise", None, "Denoise: true, false or both; if not given, true for Gaussian training noise."
)
MULTIPLIER = common.define_number("denoise_multiplier", 1.0, "Multiply the score by s in denoising.")
INCEPTION = flags.DEFINE_string(
    "inception", None, "Read FID's weights from this PyTorch file; if not given, train a classifier."
)
REFERENCE = flags.DEFINE_string(
    "reference", None, "Compare with the statistics in this npz file, in place of a split's own."
)
REFERENCE_SPLIT = flags.DEFINE_enum("reference_split", "train", ["train", "test"], "Compare samples with this split.")
SAVE_SAMPLES = flags.DEFINE_string(
    "save_samples", None, "Write the samples of the last setting to this npz file, in ADM's format."
)
common.define_guidance_flags()
common.define_decoder_flags()


def check_samples(pipe: TarFlowPipeline, metrics: Sequence[str]) -> None:
    """Raises ValueError, before hours of work, for what these metrics would be refused for after them."""
    network = "inception" if INCEPTION.value else "classifier"
    distances.check_metrics(list(metrics), network)
    needed = NUM_FEATURES[network]
    if {"fid", "sfid"} & set(metrics) and NUM_SAMPLES.value < needed:
        raise UserError(f"--num_samples is {NUM_SAMPLES.value}; a Fréchet distance needs at least {needed}")
    for guidance, _ in sample_settings(pipe):
        checked = check_guidance(pipe.config, guidance)
        if common.draws_clean_images():
            check_student_guidance(check_student(pipe.student).config, checked)


def measure_samples(subject: Subject, metrics: list[str]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of a table, one a setting of guidance and denoising; and the protocol they share."""
    train, test = subject.source("train"), subject.source("test")
    source = train if REFERENCE_SPLIT.value == "train" else test
    settings = sample_settings(subject.pipe)
    counts, labels = sample_labels(subject.pipe.config.num_classes, source)
    folders = [draw(subject, guidance, denoise, counts) for guidance, denoise in settings]
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
        reference = distances.data_set_reference(
            extractor, source, split, preprocessing, subject.data_dir / "evaluation"
        )
    rows = []
    for (guidance, denoise), folder in zip(settings, folders, strict=True):
        samples = generation.read_chunks(folder, NUM_SAMPLES.value, CHUNK_SIZE, counts)
        row = {"guidance": guidance.weight, "denoised": denoise, "not finite": samples.num_not_finite}
        features = extractor(samples.images, f"features, guidance {guidance.weight:g}")
        rows.append(row | distances.sample_metrics(metrics, network.name, features, reference))
    if SAVE_SAMPLES.value:
        write_samples(SAVE_SAMPLES.value, samples.images, samples.labels)
    protocol = {
        "num_samples": NUM_SAMPLES.value,
        "labels": labels,
        "decoder": "sequential",
        **decoder_protocol(subject.pipe),
        **{name: flags.FLAGS[name].value for name in common.GUIDANCE_FLAGS},
        "denoise_multiplier": MULTIPLIER.value,
        "network": f"{network.name}, {network.identity}",
        "reference": reference.protocol,
    }
    return rows, protocol


def sample_settings(pipe: TarFlowPipeline) -> list[tuple[Guidance, bool]]:
    """Every --guidance with every --denoise."""
    if common.draws_clean_images() and "false" in (DENOISE.value or ()):
        raise UserError(
            "--denoise=false is not for --decoder=student, whose images are clean; with --polish they are not"
        )
    words = (
        ["true"]
        if common.draws_clean_images()
        else DENOISE.value or ["true" if pipe.noise_std is not None else "false"]
    )
    if set(words) - {"true", "false"}:
        raise UserError(f"--denoise has {','.join(words)!r}; expected true, false, or false,true")
    try:
        weights = [float(weight) for weight in GUIDANCE.value]
    except ValueError:
        raise UserError(f"--guidance has {','.join(GUIDANCE.value)!r}; expected numbers") from None
    guidances = map(common.guidance, weights)
    return [(guidance, word == "true") for guidance, word in itertools.product(guidances, words)]


def sample_labels(num_classes: int, reference: ImageSource) -> tuple[np.ndarray, str]:
    """How often samples have each label, as integers [classes] without a common divisor; and that in words.

    The distance of samples that have others than the reference would be that of the labels, not of the images.
    """
    if not num_classes:
        return np.zeros(0, np.int64), "none"
    if not REFERENCE.value:
        counts = reference.class_counts()
        if len(counts) == num_classes and counts.any():
            return counts // np.gcd.reduce(counts), "as often as in the reference split"
    return np.ones(num_classes, np.int64), "in turn"


def decoder_protocol(pipe: TarFlowPipeline) -> dict[str, Any]:
    """What figures say of the decoder; nothing of the sequential one."""
    name, polish = flags.FLAGS.decoder, flags.FLAGS.polish
    if name == "sequential":
        return {}
    if name != "student":
        return {"decoder": name}
    weights = fingerprint(check_student(pipe.student).variables)
    return {"decoder": f"student, polish {polish}" if polish else name, "student": weights}


def draw(subject: Subject, guidance: Guidance, denoise: bool, class_counts: np.ndarray) -> epath.Path:
    """Draws what is missing of a setting's samples; returns their folder when all processes are done."""
    protocol = {
        **{name: subject.protocol[name] for name in ("fingerprint", "seed", "compute")},
        "guidance": dataclasses.asdict(guidance) if guidance.weight else None,
        "denoise": MULTIPLIER.value if denoise else None,
        "chunk_size": CHUNK_SIZE,
        "class_counts": class_counts.tolist(),
        **decoder_protocol(subject.pipe),
    }
    folder = generation.chunk_folder(subject.out / "samples", protocol)

    def sample(key: jax.Array, number: int, labels: jax.Array | None) -> jax.Array:
        return subject.pipe.sample(key, number, labels, guidance, denoise, MULTIPLIER.value, **common.decoder())

    generation.generate(sample, folder, NUM_SAMPLES.value, CHUNK_SIZE, class_counts, SEED.value)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"samples in {folder}")
    return folder
