"""Fashion-MNIST, 28x28, class-conditional, at all noise levels (arXiv 2604.20041).

python -m launch.train --config=configs/fashion_mnist_levels.py --workdir=runs/fashion_mnist_levels

Network, optimizer and steps are those of configs/fashion_mnist.py. Measured 2026-11-26 (commit 9b7cc9a, these fields),
seeds 1 to 3: 27 to 29 minutes of one core of an AMD EPYC; test loss -0.1686, -0.1686, -0.1687 (mean over the levels);
Fréchet distance (classifier features) 5.10, 5.44, 4.94 (10,000 samples, guidance 1.5, 4 steps of denoising),
seed 1 without `image_limit`. docs/noise_levels.md has more.
"""

from ml_collections import ConfigDict

from configs import common, fashion_mnist


def get_config(variant: str = "") -> ConfigDict:
    """The recipe; the variant is "smoke" (seconds)."""
    config = common.levels(fashion_mnist.get_config())
    config.sample.guidance.weight = 1.5
    return common.with_variant(config, variant, common.smoke)
