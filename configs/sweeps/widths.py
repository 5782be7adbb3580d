"""Claim: likelihood improves with scale.

python -m launch.sweep --config=configs/sweeps/widths.py --workdir=runs/widths

The likelihood variant, 400 steps, Muon's learning rate by docs/lab/optimizers.md. Measured: docs/results.md.
"""

from ml_collections import ConfigDict

from configs.sweeping import Overrides, zipped
from configs.sweeps import small

EVALUATE = ("--metrics=bits_per_dim",)
WIDTHS = [64, 128, 192]


def get_config(variant: str = "likelihood") -> ConfigDict:
    """Returns configs/sweeps/small.py:likelihood, or another variant of it, with fewer steps."""
    config = small.get_config(variant)
    config.optimizer.warmup_steps = 40
    config.train.num_steps = 400
    return config


def sweep() -> list[Overrides]:
    """Returns runs over the width, each with its learning rate, per seed."""
    shapes = zipped({"model.width": WIDTHS, "optimizer.muon_learning_rate": [0.64 / width for width in WIDTHS]})
    return [shape | {"train.seed": seed} for shape in shapes for seed in small.SEEDS]
