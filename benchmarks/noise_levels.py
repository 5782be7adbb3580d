"""Measures guided and denoised samples of one model: a row per setting, for docs/lab/noise_levels.md.

    python -m benchmarks.noise_levels --workdir=DIR --queue=QUEUE.jsonl [--rows=docs/results/noise_levels.jsonl]

A line of the queue is {"guidance": {…}, "denoising": [{…}, …], "num_images": 2500, "seed": 0}: the fields of `Guidance`
and of each `IterativeDenoising` to measure on the same samples; {} is no denoising, {"tweedie": n} is n steps of
Tweedie's formula at the level of the samples. With "test_images": true in place of guidance, it denoises test images
with noise of that level. Settings that have a row are skipped. Distances are between classifier features of the samples
and of the training images. Seconds depend on what else the machine does.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import json_lines
from benchmarks.sample_metrics import SampleMetrics
from tarflow_jax.evaluation.generation import labels_in_proportion
from tarflow_jax.pipeline import TarFlowPipeline
from tarflow_jax.sampling import Guidance, IterativeDenoising
from tarflow_jax.training import Recipe


def denoised(pipe: TarFlowPipeline, images: jax.Array, labels: Any, method: dict[str, Any]) -> jax.Array:
    """Drawn images, denoised as a setting says."""
    if "num_steps" in method:
        key = jax.random.key(1) if method.get("kind") == "sde" else None
        return pipe.denoise_samples(images, labels, method=IterativeDenoising(**method), key=key)
    for _ in range(method.get("tweedie", 0)):
        images = pipe.denoise(images, labels, noise_std=pipe.noise_std)
    return images


def samples(pipe: TarFlowPipeline, metrics: SampleMetrics, setting: dict[str, Any]) -> tuple[jax.Array, np.ndarray]:
    """(images, labels), drawn and not denoised; labels are as frequent as in the training images."""
    labels = labels_in_proportion(metrics.train.class_counts(), setting["num_images"])
    assert labels is not None
    latents = pipe.latents(jax.random.key(setting["seed"]), len(labels))
    return pipe.decode(latents, labels, Guidance(**setting["guidance"]), noise_std=pipe.sampling_noise_std), labels


def noisy_test_images(
    pipe: TarFlowPipeline, metrics: SampleMetrics, setting: dict[str, Any]
) -> tuple[jax.Array, np.ndarray]:
    """(images, labels) of the data set, with noise of the level that samples are drawn at."""
    assert pipe.noise is not None
    images, labels = metrics.test.read(np.arange(setting["num_images"]))
    levels = None if pipe.sampling_noise_std is None else jnp.full(len(images), pipe.sampling_noise_std)
    return pipe.noise(jax.random.key(setting["seed"]), images, levels), labels


def measured(
    pipe: TarFlowPipeline, metrics: SampleMetrics, setting: dict[str, Any], methods: list[Any]
) -> Iterator[dict]:
    """A row for each of the methods."""
    began = time.perf_counter()
    drawn, labels = (noisy_test_images if setting.get("test_images") else samples)(pipe, metrics, setting)
    drawn.block_until_ready()
    decoding = time.perf_counter() - began
    for method in methods:
        began = time.perf_counter()
        images = np.asarray(denoised(pipe, drawn, labels, method))
        denoising = time.perf_counter() - began
        yield metrics(images) | {"decode_seconds": round(decoding, 2), "denoise_seconds": round(denoising, 2)}


def main() -> None:
    """Measures what the queue holds and the rows do not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="a training run's folder")
    parser.add_argument("--queue", required=True, help="settings, a line each")
    parser.add_argument("--rows", default="docs/results/noise_levels.jsonl", help="where rows are added")
    args = parser.parse_args()
    pipe = TarFlowPipeline.from_pretrained(args.workdir)
    metrics = SampleMetrics(Recipe.from_workdir(args.workdir).config.data.source)
    path = Path(args.rows)
    done = json_lines(path)
    for line in Path(args.queue).read_text().splitlines():
        setting = json.loads(line)
        about = {"run": Path(args.workdir).name, **{k: v for k, v in setting.items() if k != "denoising"}}
        methods = [
            method
            for method in setting["denoising"]
            if not any(row.items() >= (about | {"denoising": method}).items() for row in done)
        ]
        if not methods:
            continue
        for method, row in zip(methods, measured(pipe, metrics, setting, methods), strict=True):
            row = {**about, "denoising": method, **row}
            print(json.dumps(row), flush=True)
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
