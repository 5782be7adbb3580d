"""Claim: uniform dequantisation gives good likelihoods, not good samples.

python -m launch.sweep --config=configs/sweeps/dequantisation.py --workdir=runs/dequantisation

The same network, labels and steps as configs/sweeps/noise.py, trained on images with uniform noise of one 8-bit step.
Measured: docs/results.md.
"""

from ml_collections import ConfigDict

from configs.sweeping import Overrides, grid
from configs.sweeps import small

EVALUATE = [
    (*small.SAMPLES, "--guidance=0,1"),
    ("--metrics=bits_per_dim",),
]


def get_config(variant: str = "") -> ConfigDict:
    """Returns configs/sweeps/small.py, or a variant of it, with uniform noise."""
    config = small.get_config(variant)
    config.noise.update({"kind": "uniform", "std": 0.0})
    config.model.image_limit = 1.0
    return config


def sweep() -> list[Overrides]:
    """Returns one run per seed."""
    return grid({"train.seed": small.SEEDS})
