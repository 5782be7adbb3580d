"""Claim: affine flows (NVP) are far better than volume-preserving ones (VP).

python -m launch.sweep --config=configs/sweeps/volume.py --workdir=runs/volume

Measured: docs/results.md.
"""

from ml_collections import ConfigDict

from configs.sweeping import Overrides, grid
from configs.sweeps import small

EVALUATE = (*small.SAMPLES, "--guidance=0,0.5,1,2")


def get_config(variant: str = "") -> ConfigDict:
    """Returns configs/sweeps/small.py, or a variant of it."""
    return small.get_config(variant)


def sweep() -> list[Overrides]:
    """Returns runs of both kinds, per seed."""
    return grid({"model.volume_preserving": [False, True], "train.seed": small.SEEDS})
