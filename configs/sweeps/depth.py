"""The paper's ablation of depth, on Fashion-MNIST: blocks against layers, eight layers in all.

python -m launch.sweep --config=configs/sweeps/depth.py --workdir=runs/depth

paper: with the product fixed, as many blocks as layers is best, and one block is far worse. Not measured here yet:
each of the four runs is a training of configs/fashion_mnist.py, whose header tells how long that takes.
"""

from ml_collections import ConfigDict

from configs import fashion_mnist
from configs.sweeping import Overrides, zipped


def get_config(variant: str = "") -> ConfigDict:
    """configs/fashion_mnist.py and its variants."""
    return fashion_mnist.get_config(variant)


def sweep() -> list[Overrides]:
    """Blocks x layers of a product of 8."""
    return zipped({"model.num_blocks": [1, 2, 4, 8], "model.layers_per_block": [8, 4, 2, 1]})
