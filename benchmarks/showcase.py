"""Draws the README's picture: one run's samples from the same latents: raw; denoised; guided and denoised.

python -m benchmarks.showcase --workdir=runs/fashion_mnist --out=docs/results/showcase.png
"""

import argparse
from pathlib import Path

import jax
import numpy as np
from matplotlib.figure import Figure

from launch.cli import example_labels
from tarflow_jax.figures import grid, to_uint8
from tarflow_jax.pipeline import TarFlowPipeline
from tarflow_jax.sampling import Guidance

ROWS = 5  # images of a class


def main() -> None:
    """Draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="of a run with classes and Gaussian noise")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--guidance", type=float, default=1.0, help="weight")
    args = parser.parse_args()
    pipe = TarFlowPipeline.from_pretrained(args.workdir)
    classes = pipe.config.num_classes
    labels = example_labels(classes, classes * ROWS)
    settings = {
        "raw": (None, False),
        "denoised": (None, True),
        f"guided (weight {args.guidance:g}) and denoised": (Guidance(args.guidance), True),
    }
    figure = Figure(figsize=(16.5, 3.3), layout="constrained")
    for axes, (title, (guidance, denoise)) in zip(figure.subplots(1, 3), settings.items(), strict=True):
        images = to_uint8(pipe.sample(jax.random.key(1), len(labels), labels, guidance, denoise))
        sheet = grid(images, classes)
        axes.imshow(np.squeeze(sheet), cmap="gray", vmin=0, vmax=255)
        axes.set_title(title)
        axes.set_axis_off()
    figure.savefig(args.out, dpi=120)


if __name__ == "__main__":
    main()
