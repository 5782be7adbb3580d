"""The paper's ablation of noise and guidance, on Fashion-MNIST: distance of the samples to the data.

python -m launch.sweep --config=configs/sweeps/noise_and_guidance.py --workdir=runs/noise_and_guidance

Guidance is a choice of sampling, so there is one training for each noise, a configs/fashion_mnist.py (whose header
tells how long that takes), and samples are drawn of it at each weight. Not measured here yet.
"""

from ml_collections import ConfigDict

from configs import fashion_mnist
from configs.sweeping import Overrides, grid

EVALUATE = ("--metrics=fid", "--guidance=0,0.5,1,2", "--num_samples=10000")


def get_config(variant: str = "") -> ConfigDict:
    """configs/fashion_mnist.py and its variants."""
    return fashion_mnist.get_config(variant)


def sweep() -> list[Overrides]:
    """σ of the training noise, in [-1, 1] units."""
    return grid({"noise.std": [0.02, 0.05, 0.1, 0.2]})
