"""Claim: smaller patches give better likelihood, for more steps of sampling.

python -m launch.sweep --config=configs/sweeps/patches.py --workdir=runs/patches --metric=bits/dim

The likelihood variant. Diagonal affine maps, as the paper's: triangular ones soften just this. Measured:
docs/results.md.
"""

from ml_collections import ConfigDict

from configs.sweeping import Overrides, grid
from configs.sweeps import small

EVALUATE = ("--metrics=bits_per_dim",)


def get_config(variant: str = "likelihood") -> ConfigDict:
    """configs/sweeps/small.py:likelihood with diagonal affine maps, or another variant of it."""
    config = small.get_config(variant)
    config.model.triangular = False
    return config


def sweep() -> list[Overrides]:
    """Sides of a patch: 196, 49 and 16 tokens."""
    return grid({"model.patch_size": [2, 4, 7], "train.seed": small.SEEDS})
