"""Draws the picture of docs/results.md: a run's samples from the same latents, raw, denoised, and also guided.

python -m benchmarks.showcase --workdir=runs/guidance/train.seed=1 --guidance=2 --out=docs/results/showcase.png
"""

import argparse
from pathlib import Path

import jax
import numpy as np

from benchmarks.pictures import SIDE
from launch.cli import example_labels
from tarflow_jax.figures import enlarge, grid, save_png, to_uint8
from tarflow_jax.pipeline import TarFlowPipeline
from tarflow_jax.sampling import Guidance


def main() -> None:
    """Draws an image of each class in every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="of a run with classes and Gaussian noise")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--guidance", type=float, default=1.0, help="weight")
    args = parser.parse_args()
    pipe = TarFlowPipeline.from_pretrained(args.workdir)
    labels = example_labels(pipe.config.num_classes, pipe.config.num_classes)
    rows = {
        "raw": (None, False),
        "denoised": (None, True),
        f"guided ({args.guidance:g}), denoised": (Guidance(args.guidance), True),
    }
    images = [pipe.sample(jax.random.key(1), len(labels), labels, *setting) for setting in rows.values()]
    save_png(args.out, grid(enlarge(to_uint8(np.concatenate(images)), SIDE), len(labels), titles=list(rows)))


if __name__ == "__main__":
    main()
