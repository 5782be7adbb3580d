"""Claim: smaller patches give better likelihoods, at the cost of more sampling steps.

python -m launch.sweep --config=configs/sweeps/patches.py --workdir=runs/patches

The likelihood variant, with the paper's diagonal affine maps: triangular ones weaken just this effect. Measured:
docs/results.md.
"""

from ml_collections import ConfigDict

from configs.sweeping import Overrides, grid
from configs.sweeps import small

EVALUATE = ("--metrics=bits_per_dim",)


def get_config(variant: str = "likelihood") -> ConfigDict:
    """Returns configs/sweeps/small.py:likelihood, or another variant of it, with diagonal affine maps."""
    config = small.get_config(variant)
    config.model.triangular = False
    return config


def sweep() -> list[Overrides]:
    """Returns runs over the side of a patch: 196, 49 and 16 tokens."""
    return grid({"model.patch_size": [2, 4, 7], "train.seed": small.SEEDS})
