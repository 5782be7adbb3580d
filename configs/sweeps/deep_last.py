"""Claim: layers are best where the noise is: three blocks of one layer, and one of five nearest the noise.

python -m launch.sweep --config=configs/sweeps/deep_last.py --workdir=runs/deep_last --metric=Fréchet

To be compared with configs/sweeps/depth.py. Measured: docs/results.md.
"""

from ml_collections import ConfigDict

from configs.sweeping import Overrides, grid
from configs.sweeps import small
from configs.sweeps.depth import EVALUATE as EVALUATE


def get_config(variant: str = "") -> ConfigDict:
    """configs/sweeps/small.py with other depths; its variants."""
    config = small.get_config(variant)
    with config.model.ignore_type():
        config.model.layers_per_block = (1, 1, 1, 5)
    return config


def sweep() -> list[Overrides]:
    """Seeds."""
    return grid({"train.seed": small.SEEDS})
