"""Claim: an unconditional model can be guided too, away from itself at another attention temperature.

python -m launch.sweep --config=configs/sweeps/unconditional.py --workdir=runs/unconditional

Measured: docs/results.md.
"""

from ml_collections import ConfigDict

from configs.sweeping import Overrides, grid
from configs.sweeps import small

EVALUATE = [
    (*small.SAMPLES, "--guidance=0,0.2,0.5,1", "--attention_temperature=0.5"),
    (*small.SAMPLES, "--guidance=0.2,0.5,1", "--attention_temperature=0.8"),
    (*small.SAMPLES, "--guidance=0.2,0.5,1", "--attention_temperature=1.5"),
]


def get_config(variant: str = "") -> ConfigDict:
    """Returns configs/sweeps/small.py, or a variant of it, without classes."""
    config = small.get_config(variant)
    config.model.num_classes = 0
    config.train.drop_label = 0.0
    config.sample.guidance.update({"weight": 0.5, "attention_temperature": 0.5})  # for the run's own figures
    return config


def sweep() -> list[Overrides]:
    """Returns one run per seed."""
    return grid({"train.seed": small.SEEDS})
