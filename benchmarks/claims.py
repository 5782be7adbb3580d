"""Measures what no sweep can for docs/results.md: trained models, and variants that recipes do not have.

    python -m benchmarks.claims bounds
    python -m benchmarks.claims directions
    python -m benchmarks.claims updates exactness density --workdir=runs/guidance

Each adds rows to docs/results/NAME.csv; `--workdir` is the folder of a launch.sweep whose runs differ in their seed.
bounds: distances of real test images and of noise, between which those of samples lie. directions: bits/dim of
configs/sweeps/dequantisation.py with all blocks reading forwards; run it in a process of its own. updates: number of
fixed-point decoding updates, by block and training step. exactness: errors of the inverse and of log |det|. density:
classification of test images by Bayes' rule, and outlier detection by log p.
"""

import argparse
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import add_row
from benchmarks.optimizers import run_trial
from benchmarks.sample_metrics import SampleMetrics
from configs.sweeps.small import SEEDS
from launch.cli import example_labels
from tarflow_jax.data import open_source
from tarflow_jax.evaluation import classification
from tarflow_jax.flow import Conditioning, TarFlow, TarFlowConfig, block
from tarflow_jax.pipeline import TarFlowPipeline
from tarflow_jax.sampling import Jacobi
from tarflow_jax.training import Recipe

NUM_IMAGES = 2500
Rows = Iterator[dict[str, Any]]


def bounds() -> Rows:
    """Distances of real images that no flow has seen, and of noise."""
    metrics = SampleMetrics("fashion_mnist")
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        chosen = rng.choice(len(metrics.test), NUM_IMAGES, replace=False)
        yield {"train.seed": seed, "images": "test images"} | metrics(metrics.test.read(np.sort(chosen))[0])
        noise = rng.integers(256, size=(NUM_IMAGES, *metrics.test.image_shape), dtype=np.uint8)
        yield {"train.seed": seed, "images": "uniform noise"} | metrics(noise)


def directions() -> Rows:
    """The training of configs/sweeps/dequantisation.py, but with blocks that all read forwards."""
    trial = {"name": "directions", "recipe": "sweeps.dequantisation", "overrides": {}}
    for seed in SEEDS:
        with mock.patch.object(block, "permute", lambda tokens, index, axis=1: tokens):
            row = run_trial(trial, seed)
        yield {"train.seed": seed, "directions": "all forwards", "bits/dim": row["bits_per_dim"], "steps": row["steps"]}


def runs_of(workdir: Path) -> Iterator[tuple[int, Path]]:
    """The seed and the folder of each run of a sweep."""
    for folder in sorted(path for path in workdir.iterdir() if (path / "config.json").exists()):
        yield json.loads((folder / "config.json").read_text())["train"]["seed"], folder


def updates(workdir: Path) -> Rows:
    """Mean updates of `Jacobi()` for each block, at every checkpoint of the run."""
    for seed, folder in runs_of(workdir):
        steps = sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())
        for step in steps:
            with tempfile.TemporaryDirectory() as copy:
                shutil.copytree(folder, copy, dirs_exist_ok=True)
                for later in steps[steps.index(step) + 1 :]:
                    shutil.rmtree(Path(copy, "checkpoints", str(later)))
                pipe = TarFlowPipeline.from_pretrained(copy)
            labels, latents = example_labels(10, 100), pipe.latents(jax.random.key(seed), 100)
            found = pipe.decode_trace(latents, labels, decoder=Jacobi()).updates.T
            row = {"train.seed": seed, "step": step, "most": pipe.config.num_tokens - 1}
            yield row | {f"block {k}": float(np.mean(of_block)) for k, of_block in enumerate(found)}


def whole_log_det(config: TarFlowConfig, variables: Any, image: jax.Array, label: np.ndarray) -> float:
    """log |det d latents / d image|, nats, of the Jacobian of all pixels; image [H, W, K], label [1]."""

    def forward(x: jax.Array) -> jax.Array:
        return TarFlow(config).apply(variables, x[None], Conditioning(label))[0].ravel()

    jacobian = np.asarray(jax.jit(jax.jacrev(forward))(image), np.float64).reshape(config.num_dims, config.num_dims)
    return float(np.linalg.slogdet(jacobian)[1])


def exactness(workdir: Path) -> Rows:
    """Largest error of decode(encode(x)) over 100 test images, and log |det| beside that of a whole Jacobian."""
    for seed, folder in runs_of(workdir):
        trained, recipe = TarFlowPipeline.from_pretrained(folder), Recipe.from_workdir(folder)
        clean, labels = recipe.source("test").read(np.arange(100))
        images = recipe.noise(jax.random.key(seed), jnp.asarray(clean))
        for dtype in ("float32", "bfloat16"):
            config = dataclasses.replace(trained.config, dtype=dtype)
            pipe = TarFlowPipeline(config, trained.variables, trained.noise)
            latents, log_det = pipe.encode(images, labels)
            errors = np.abs(np.asarray(pipe.decode(latents, labels)) - np.asarray(images)).max((1, 2, 3))
            yield {
                "train.seed": seed,
                "dtype": dtype,
                "largest error of the inverse": float(errors.max()),
                "median over images": float(np.median(errors)),
                "log |det|, nats": float(log_det[0]),
                "its error": float(log_det[0]) - whole_log_det(config, trained.variables, images[0], labels[:1]),
            }


def density(workdir: Path) -> Rows:
    """Accuracy and calibration of Bayes' rule on test images, and AUROC of log p against digits and noise."""
    for seed, folder in runs_of(workdir):
        pipe, recipe = TarFlowPipeline.from_pretrained(folder), Recipe.from_workdir(folder)
        clean, labels = recipe.source("test").read(np.arange(NUM_IMAGES))
        digits = open_source("digits", "test")
        rng = np.random.default_rng(seed)
        others = {
            "digits": classification.fit_images(digits.read(np.arange(len(digits)))[0], pipe.config.image_shape),
            "noise": rng.integers(256, size=clean.shape, dtype=np.uint8),
        }
        key = jax.random.key(seed)
        noisy = recipe.noise(key, jnp.asarray(clean))
        row = {"train.seed": seed, "images": len(clean)}
        log_probs = classification.class_log_probs(pipe.log_prob, noisy, pipe.config.num_classes)
        row |= classification.bayes_classification(log_probs, labels)
        inside = np.asarray(pipe.log_prob(noisy))
        for name, images in others.items():
            outside = np.asarray(pipe.log_prob(recipe.noise(key, jnp.asarray(images))))
            row[f"AUROC against {name}"] = classification.outlier_scores(inside, outside, pipe.config.num_dims)["auroc"]
        yield row


def main() -> None:
    """Measures what is asked for."""
    known = {function.__name__: function for function in (bounds, directions)}
    of_runs = {function.__name__: function for function in (updates, exactness, density)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claims", nargs="+", choices=[*known, *of_runs])
    parser.add_argument("--workdir", type=Path, help="of a sweep over seeds")
    parser.add_argument("--rows", type=Path, default=Path("docs/results"), help="the tables' folder")
    args = parser.parse_args()
    if args.workdir is None and not known.keys() >= set(args.claims):
        parser.error(f"{', '.join(of_runs)} need --workdir, the folder of a sweep")
    for name in args.claims:
        for row in known[name]() if name in known else of_runs[name](args.workdir):
            add_row(args.rows / f"{name}.csv", row)


if __name__ == "__main__":
    main()
