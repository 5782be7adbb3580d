"""Claim: of eight layers in all, as many blocks as layers in each is best, and one block fails.

python -m launch.sweep --config=configs/sweeps/depth.py --workdir=runs/depth --parallel=2 --metric=Fréchet

configs/sweeps/deep_last.py has the same eight layers as 1, 1, 1, 5. Measured: docs/results.md.
"""

from ml_collections import ConfigDict

from configs.sweeping import Overrides, zipped
from configs.sweeps import small

EVALUATE = (*small.SAMPLES, "--guidance=0,0.5,1,2")


def get_config(variant: str = "") -> ConfigDict:
    """configs/sweeps/small.py and its variants."""
    return small.get_config(variant)


def sweep() -> list[Overrides]:
    """Blocks x layers of a product of 8."""
    shapes = zipped({"model.num_blocks": [1, 2, 4, 8], "model.layers_per_block": [8, 4, 2, 1]})
    return [shape | {"train.seed": seed} for shape in shapes for seed in small.SEEDS]
