"""Measures a trained model: likelihood, distances of its samples to the data, and the flow as a classifier.

    python -m launch.evaluate --workdir=runs/fashion_mnist --metrics=bits_per_dim
    python -m launch.evaluate --workdir=DIR --metrics=fid,precision_recall --guidance=0,1,2 --denoise=false,true

Prints tables, and writes them with their protocol to DIR/evaluation/. What each metric is: docs/howto/evaluate.md.
"""

import functools
import hashlib
import json
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath
from flax.traverse_util import flatten_dict

from launch import cli, end_at_signals
from tarflow_jax.arguments import check_levels, check_sampling, check_student_guidance
from tarflow_jax.data import ImageSource, LatentSource, SequenceSource, data_folder, open_arrays, open_source
from tarflow_jax.errors import UserError
from tarflow_jax.evaluation import classification, distances, generation
from tarflow_jax.evaluation.classifier import classifier_network
from tarflow_jax.evaluation.inception import inception_network
from tarflow_jax.evaluation.likelihood import measure_likelihood
from tarflow_jax.files import write_text
from tarflow_jax.fingerprint import fingerprint
from tarflow_jax.runtime import BatchRunner, environment, make_mesh
from tarflow_jax.sampling import Guidance
from tarflow_jax.text_to_image import TextToImage
from tarflow_jax.training import Recipe
from tarflow_jax.training.recipe import DataOptions, same_data

ALL_METRICS = ("bits_per_dim", *distances.METRICS, "classification", "outliers", "log_prob")
TUNING_IMAGES = 500  # to find the noise level that classifies best

DATA = flags.DEFINE_string("data", None, "Data set; default: the one the run was trained on.")
PREPROCESSING = flags.DEFINE_string("preprocessing", None, "Preprocessing of --data: none, tarflow or adm.")
OUT = flags.DEFINE_string("out", None, "Folder for the results; default: WORKDIR/evaluation or ./evaluation.")
METRICS = flags.DEFINE_list("metrics", ["bits_per_dim"], f"Metrics: {', '.join(ALL_METRICS)} (for sequences).")
SPLIT = flags.DEFINE_string("split", "test", "Split for likelihood, classification and outliers.")
SEED = cli.define_seed("Seed of the noise and the samples.")
NOISE_STD = flags.DEFINE_float("noise_std", None, "Noise level σ; default: the lowest, the best for classification.")
ALLOW_NOISY = flags.DEFINE_bool("allow_noisy", False, "Report nats/dim of noisy data for Gaussian training noise.")
DRAWS = flags.DEFINE_integer("dequantisation_draws", 1, "Draws K of the importance-weighted bound.", lower_bound=1)
CLASSIFICATION_DRAWS = flags.DEFINE_integer("classification_draws", 1, "Draws to average log p over.", lower_bound=1)
OUTLIERS = flags.DEFINE_string("outliers", None, "Out-of-distribution data set.")
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 50_000, "Number of samples for each setting.", lower_bound=2)
GUIDANCE = flags.DEFINE_list("guidance", ["0"], "Guidance weights w, one setting each.")
DENOISE = flags.DEFINE_list("denoise", None, "True, false or both; default: as launch.sample does.")
MULTIPLIER = cli.define_number("denoise_multiplier", 1.0, "Factor of the score in denoising.")
INCEPTION = flags.DEFINE_string("inception", None, "PyTorch file of FID's weights; default: a judge or a classifier.")
REFERENCE = flags.DEFINE_string("reference", None, "File (npz) of reference statistics, instead of a split.")
REFERENCE_SPLIT = flags.DEFINE_enum("reference_split", "train", ["train", "test"], "Split to compare samples with.")
PROMPTS = flags.DEFINE_string("prompts", None, "File of captions, one a line; default: those of --reference_split.")
SAVE_SAMPLES = flags.DEFINE_string("save_samples", None, "File (npz, as ADM's) for the last setting's samples.")
cli.define_guidance_flags()
cli.define_decoder_flags()
cli.define_model_flags()
cli.define_process_flags()


class Evaluation:
    """The model, on the devices of this process, and the data that the flags name."""

    def __init__(self) -> None:
        name, place = cli.model_name()
        workdir = name if flags.FLAGS.model is None else None
        self._trained_on = Recipe.from_workdir(workdir).config.data if workdir else DataOptions()
        if not workdir and DATA.value is None:
            raise UserError("a saved model does not say what data it was trained on; name it, --data=NAME")
        self.pipe = pipe = cli.open_pipeline(name, make_mesh(devices=jax.local_devices()), sequences=True)
        self.text_to_image = None if pipe.config.image_bits else TextToImage.from_flow(pipe, name)
        self.denoises = self.text_to_image.denoises if self.text_to_image else pipe.noise_std is not None
        self.denoises |= cli.draws_clean_images()
        self.data_dir = data_folder(self._trained_on.data_dir)
        self.out = epath.Path(cli.folder("out") if OUT.value else f"{place}/evaluation")
        self.data_set = DATA.value or self._trained_on.source
        if workdir:
            self._compare_data(workdir)
        self.source = self.open(SPLIT.value)
        self.protocol = {
            "model": name,
            "fingerprint": fingerprint(pipe.variables),
            "training_noise": "unknown" if pipe.noise is None else str(pipe.noise),
            "data_set": self.data_set,
            "data_fingerprint": self.source.fingerprint[:16],
            "preprocessing": self.source.preprocessing,
            "split": SPLIT.value,
            "compute": pipe.config.dtype,
            "seed": SEED.value,
        }
        if OUTLIERS.value:
            self.outliers = open_source(OUTLIERS.value, SPLIT.value, data_dir=self.data_dir)
            self.protocol |= {"outliers": OUTLIERS.value, "outliers_fingerprint": self.outliers.fingerprint[:16]}

    def _compare_data(self, workdir: str) -> None:
        """Raises UserError if the run's own data has changed; warns if flags ask for other data."""
        other = DATA.value or PREPROCESSING.value
        try:
            if same_data(workdir, self.open("train")):
                return
        except (UserError, FileNotFoundError):
            if not other:
                raise
        message = f"{self.data_set} is not what {workdir} was trained on"
        if not other:
            changed = "images, labels or their order have changed since"
            raise UserError(f"{message}: {changed}; bring them back, or measure what is there, --data={self.data_set}")
        print(f"warning: {message}", file=sys.stderr)

    def open(self, split: str) -> ImageSource | SequenceSource:
        """Opens a split of the data set: what the flow models or, for a flow of latents, perhaps the images."""
        config = self.pipe.config
        if config.is_sequence:
            return open_arrays(self.data_set, split, config)
        options = {"data_dir": self.data_dir, "skip_bad": self._trained_on.skip_bad}
        options["preprocessing"] = PREPROCESSING.value or self._trained_on.preprocessing
        options["image_size"] = None if self.text_to_image else config.image_size
        source = open_source(self.data_set, split, **options)
        if not (self.text_to_image and source.bits):
            if source.image_shape != config.image_shape:
                raise UserError(f"{source.name} has images {source.image_shape}, the model {config.image_shape}")
            if source.bits != config.image_bits:
                raise UserError(f"{source.name} has images of {source.bits} bits, the model {config.image_bits}")
        return source

    def images(self, split: str) -> ImageSource:
        """Opens the images that samples are compared with: of packed latents those that were encoded."""
        source = self.open(split)
        if isinstance(source, LatentSource):
            return open_source(source.images_name, split, data_dir=self.data_dir)
        return source

    @functools.cached_property
    def reference_images(self) -> ImageSource:
        """The images of --reference_split."""
        return self.images(REFERENCE_SPLIT.value)

    @functools.cached_property
    def captions(self) -> list[str]:
        """The captions to draw in turn, shuffled; [] without text."""
        if not (self.text_to_image and self.text_to_image.text):
            return []
        if PROMPTS.value:
            lines = epath.Path(os.path.expanduser(PROMPTS.value)).read_text().splitlines()
            captions = [line.strip() for line in lines if line.strip()]
        else:
            captions = [texts[0] for texts in self.reference_images.captions]
        return [captions[i] for i in np.random.default_rng(0).permutation(len(captions))]


def check(evaluation: Evaluation, metrics: Sequence[str]) -> None:
    """Raises UserError for what a metric would reject only after hours of work, OSError for the folder of results."""
    pipe, source, config = evaluation.pipe, evaluation.source, evaluation.pipe.config
    of_samples = [metric for metric in metrics if metric in distances.METRICS]
    if wrong := [metric for metric in metrics if (metric == "log_prob") != config.is_sequence]:
        kind = "images; log_prob is for sequences" if config.is_sequence else "sequences; bits_per_dim is for images"
        raise UserError(f"{wrong[0]} is for {kind}")
    if evaluation.text_to_image:
        if wrong := [metric for metric in metrics if metric in ("classification", "outliers")]:
            raise UserError(f"{wrong[0]} is for a flow of images; this one is of latents")
        if "bits_per_dim" in metrics and source.bits:
            raise UserError(f"log p is of latents, {source.name} has images; name the packed ones, --data=latents:…")
    if "bits_per_dim" in metrics and pipe.noise_std is not None and not ALLOW_NOISY.value:
        advice = "train with noise.kind=uniform, or pass --allow_noisy for nats/dim of noisy data"
        raise UserError(f"bits/dim is defined for models trained with uniform noise, this one's was gaussian; {advice}")
    if NOISE_STD.value is not None:
        check_levels(config, NOISE_STD.value, 1)
    elif config.noise_conditional and pipe.noise is None:
        raise UserError("the noise levels of this model are not known; name one, --noise_std=σ")
    if {"bits_per_dim", "classification"} & set(metrics) and source.num_classes > config.num_classes > 0:
        raise UserError(f"{source.name} has {source.num_classes} classes, the model {config.num_classes}")
    if len(of_samples) < len(metrics) and len(source) < 2:
        raise UserError(f"the {SPLIT.value} split of {evaluation.data_set} has 1 image; expected several")
    if "classification" in metrics and not config.num_classes:
        raise UserError("classification needs a class-conditional model, this one has no classes")
    if "classification" in metrics and not source.num_classes:
        raise UserError(f"{source.name} has no labels; classification needs them")
    if "outliers" in metrics:
        if OUTLIERS.value is None:
            raise UserError("outliers needs a second data set, --outliers=NAME")
        classification.fit_images(evaluation.outliers.read([0])[0], config.image_shape)
    if of_samples:
        if evaluation.reference_images.bits != 8:
            raise UserError(f"{of_samples[0]} is of 8-bit images; choose bits_per_dim, classification or outliers")
        num_real = None if REFERENCE.value else len(evaluation.reference_images)
        network = "inception" if INCEPTION.value else "classifier"
        distances.check_metrics(of_samples, network, NUM_SAMPLES.value, num_real)
        if INCEPTION.value:
            inception_network(os.path.expanduser(INCEPTION.value))
        if REFERENCE.value:
            distances.read_reference(os.path.expanduser(REFERENCE.value))
        for guidance, denoise in sample_settings(evaluation.denoises):
            guidance = guidance.checked_for(config)
            if cli.draws_clean_images():
                check_student_guidance(pipe.require_student().config, guidance)
            check_sampling(config, pipe.noise, cli.decoder(), denoise, MULTIPLIER.value, return_log_prob=False)
    write_text(evaluation.out / ".writable", "")
    (evaluation.out / ".writable").unlink(missing_ok=True)


def measure(evaluation: Evaluation, metric: str) -> dict[str, Any]:
    """Measures what needs no samples."""
    pipe, source, level, key = evaluation.pipe, evaluation.source, NOISE_STD.value, jax.random.key(SEED.value)
    if metric == "classification":
        if level is None and pipe.config.noise_conditional:
            train = evaluation.open("train")
            images, labels = train.read(np.arange(min(len(train), TUNING_IMAGES)))
            level = classification.best_noise_level(pipe, images, labels, key)
        images, labels = source.read(np.arange(len(source)))
        log_probs = classification.mean_class_log_probs(pipe, images, key, level, CLASSIFICATION_DRAWS.value)
        result = classification.bayes_classification(log_probs, labels) | {"draws": CLASSIFICATION_DRAWS.value}
        return result if level is None else result | {"noise_level": level}
    if level is None and pipe.config.noise_conditional:
        level = pipe.noise.std_min
    if metric == "outliers":
        inside, outside = (each.read(np.arange(len(each)))[0] for each in (source, evaluation.outliers))
        return classification.detect_outliers(pipe, inside, outside, key, level)
    runner = BatchRunner(make_mesh(), cli.memory_bound())  # over all processes, which share the split
    return measure_likelihood(pipe, source, key, level, DRAWS.value, runner)


def sample_settings(denoise: bool) -> list[tuple[Guidance, bool]]:
    """Returns every combination of --guidance and --denoise, whose default is `denoise`; UserError for wrong flags."""
    words = DENOISE.value or [str(denoise).lower()]
    if set(words) - {"true", "false"}:
        raise UserError(f"--denoise has {','.join(words)!r}; expected true, false, or false,true")
    try:
        weights = [float(weight) for weight in GUIDANCE.value or [""]]
    except ValueError:
        raise UserError(f"--guidance has {','.join(GUIDANCE.value)!r}; expected numbers") from None
    return [(cli.guidance(weight), word == "true") for weight in weights for word in words]


def measure_samples(evaluation: Evaluation, metrics: list[str]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Returns a row for each setting of guidance and denoising, and the protocol that the rows share."""
    pipe, captions, cache_dir = evaluation.pipe, evaluation.captions, evaluation.data_dir / "evaluation"
    source, file = evaluation.reference_images, REFERENCE.value and os.path.expanduser(REFERENCE.value)
    counts, labels = generation.label_counts(pipe.config.num_classes, None if file else source)
    if captions:
        counts, labels = np.ones(len(captions), np.int64), f"{len(captions)} captions in turn"
    folders = {}
    for guidance, denoise in sample_settings(evaluation.denoises):
        model, decoder = evaluation.text_to_image or pipe, cli.decoder()
        sampler = generation.Sampler(model, guidance, denoise, MULTIPLIER.value, decoder, captions)
        folder = generation.draw_samples(sampler, evaluation.out / "samples", NUM_SAMPLES.value, counts, SEED.value)
        folders[guidance.weight, denoise] = folder
    if jax.process_index():
        return [], {}
    if INCEPTION.value:
        network = inception_network(os.path.expanduser(INCEPTION.value))
    else:
        network = classifier_network(evaluation.images("train"), evaluation.images("test"), cache_dir)
    if file:
        reference = distances.file_reference(network, file, metrics)
    else:
        reference = distances.data_set_reference(network, source, REFERENCE_SPLIT.value, cache_dir)
    rows = []
    for (weight, denoise), folder in folders.items():
        samples = generation.read_chunks(folder, NUM_SAMPLES.value, counts)
        features = network(samples.images, f"features, guidance {weight:g}")
        row = {"guidance": weight, "denoised": denoise, "not finite": samples.num_not_finite}
        rows.append(row | distances.sample_metrics(metrics, network.name, features, reference))
    if SAVE_SAMPLES.value:
        generation.write_samples(os.path.expanduser(SAVE_SAMPLES.value), samples.images, samples.labels)
    protocol = {"num_samples": NUM_SAMPLES.value, "labels": labels}
    protocol["decoder"] = flags.FLAGS.decoder + (f", polish {flags.FLAGS.polish}" if flags.FLAGS.polish else "")
    if flags.FLAGS.decoder == "student":
        protocol["student"] = fingerprint(pipe.require_student().variables)
    protocol |= {name: flags.FLAGS[name].value for name in (*cli.GUIDANCE_FLAGS, "denoise_multiplier")}
    return rows, protocol | {"network": f"{network.name}, {network.identity}", "reference": reference.protocol}


def main(argv: Sequence[str]) -> None:
    """Measures, prints, writes."""
    metrics = list(dict.fromkeys(METRICS.value))
    if not metrics or set(metrics) - set(ALL_METRICS):
        raise UserError(f"--metrics is {','.join(metrics) or 'empty'}; expected some of {', '.join(ALL_METRICS)}")
    sample_settings(True)  # refuses wrong flags before the model is opened
    cli.decoder()
    cli.join_processes()
    end_at_signals()  # JAX may have taken SIGTERM
    evaluation = Evaluation()
    if evaluation.pipe.config.is_sequence and not flags.FLAGS["metrics"].present:
        metrics = ["log_prob"]
    check(evaluation, metrics)
    results: dict[str, Any] = {}
    protocol, writes = evaluation.protocol, jax.process_index() == 0
    for metric in metrics:
        if metric not in distances.METRICS:
            results[metric] = measure(evaluation, metric)
            if writes:
                print(cli.format_table([results[metric]]), flush=True)
    if of_samples := [metric for metric in metrics if metric in distances.METRICS]:
        results["samples"], sample_protocol = measure_samples(evaluation, of_samples)
        protocol |= sample_protocol
        if writes:
            print(cli.format_table(results["samples"]))
    if not writes:
        return
    print("\n".join(f"{name}: {value}" for name, value in flatten_dict(protocol, sep=".").items()))
    settings = [flag.value for flag in (GUIDANCE, DENOISE, NOISE_STD, DRAWS, CLASSIFICATION_DRAWS)]
    name = hashlib.sha256(json.dumps([protocol, *settings]).encode()).hexdigest()[:8]
    path = evaluation.out / f"{'+'.join(metrics)}-{SPLIT.value}-{name}.json"
    finite = jax.tree.map(lambda x: x if not isinstance(x, float) or math.isfinite(x) else None, results)
    content = {"protocol": protocol, "results": finite, "environment": environment()}
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    print(path)


if __name__ == "__main__":
    cli.run(main)
