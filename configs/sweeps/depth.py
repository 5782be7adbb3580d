"""Claim: eight layers are best divided evenly between blocks and layers per block; a single block fails.

python -m launch.sweep --config=configs/sweeps/depth.py --workdir=runs/depth

configs/sweeps/deep_last.py has the same eight layers as 1, 1, 1, 5. Measured: docs/results.md.
"""

from ml_collections import ConfigDict

from configs.sweeping import Overrides, zipped
from configs.sweeps import small

EVALUATE = (*small.SAMPLES, "--guidance=0,0.5,1,2")


def get_config(variant: str = "") -> ConfigDict:
    """Returns configs/sweeps/small.py, or a variant of it."""
    return small.get_config(variant)


def sweep() -> list[Overrides]:
    """Returns runs of blocks x layers = 8, per seed."""
    shapes = zipped({"model.num_blocks": [1, 2, 4, 8], "model.layers_per_block": [8, 4, 2, 1]})
    return [shape | {"train.seed": seed} for shape in shapes for seed in small.SEEDS]
