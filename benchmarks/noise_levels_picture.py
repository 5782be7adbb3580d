"""Draws docs/lab/noise_levels.md's picture: flows of one and of many noise levels, from the same latents.

python -m benchmarks.noise_levels_picture --one=runs/fashion_mnist --many=fashion_mnist --out=FILE.png
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
    """Draws an image of each class: a row noisy, and rows denoised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", required=True, help="a run or model with a single noise level")
    parser.add_argument("--many", required=True, help="one with many, of the same data")
    parser.add_argument("--guidance", type=float, nargs=2, default=[0.7, 1.5], help="their weights")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    one, many = map(TarFlowPipeline.from_pretrained, (args.one, args.many))
    labels = example_labels(one.config.num_classes, one.config.num_classes)
    latents = one.latents(jax.random.key(0), len(labels))
    drawn = one.decode(latents, labels, Guidance(args.guidance[0]))
    noisy = many.decode(latents, labels, Guidance(args.guidance[1]), noise_std=many.sampling_noise_std)
    _, path = many.denoise_samples(noisy, labels, return_trajectory=True)
    rows = {
        f"one level: drawn, noise {one.noise_std:g}": drawn,
        "denoised in 1 step": one.denoise_samples(drawn, labels),
        f"many levels: drawn, noise {many.noise_std:g}": noisy,
        "after step 1": path[1],
        f"after step {len(path) - 1}": path[-1],
    }
    sheet = np.concatenate([enlarge(to_uint8(np.asarray(images)), SIDE) for images in rows.values()])
    save_png(args.out, grid(sheet, len(labels), titles=list(rows)))


if __name__ == "__main__":
    main()
