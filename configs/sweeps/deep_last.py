"""Claim: layers help most near the noise: three blocks of one layer, then one of five nearest the noise.

python -m launch.sweep --config=configs/sweeps/deep_last.py --workdir=runs/deep_last

Compare with configs/sweeps/depth.py. Measured: docs/results.md.
"""

from ml_collections import ConfigDict

from configs.sweeping import Overrides, grid
from configs.sweeps import small
from configs.sweeps.depth import EVALUATE as EVALUATE


def get_config(variant: str = "") -> ConfigDict:
    """Returns configs/sweeps/small.py, or a variant of it, with other depths."""
    config = small.get_config(variant)
    with config.model.ignore_type():
        config.model.layers_per_block = (1, 1, 1, 5)
    return config


def sweep() -> list[Overrides]:
    """Returns one run per seed."""
    return grid({"train.seed": small.SEEDS})
