"""Claim: guidance has an optimum away from 0, and a weight that grows over the tokens beats a constant one.

python -m launch.sweep --config=configs/sweeps/guidance.py --workdir=runs/guidance

Guidance is chosen when sampling: one training run per seed, sampled at every setting. Measured: docs/results.md.
"""

from ml_collections import ConfigDict

from configs.sweeping import Overrides, grid
from configs.sweeps import small

EVALUATE = [
    (*small.SAMPLES, "--guidance=0,0.5,1,2,3", "--guidance_schedule=linear"),
    (*small.SAMPLES, "--guidance=0.25,0.5,1,2", "--guidance_schedule=constant"),
    (*small.SAMPLES, "--guidance=0.5,1,2,3", "--guidance_target=log_scale"),
    (*small.SAMPLES, "--guidance=0.5,1,2,3", "--guidance_target=shift"),
]


def get_config(variant: str = "") -> ConfigDict:
    """Returns configs/sweeps/small.py, or a variant of it."""
    return small.get_config(variant)


def sweep() -> list[Overrides]:
    """Returns one run per seed."""
    return grid({"train.seed": small.SEEDS})
