"""Claim: Gaussian noise in training makes the samples good, once the score has denoised them.

python -m launch.sweep --config=configs/sweeps/noise.py --workdir=runs/noise --metric=Fréchet

Samples of each σ, raw and denoised with several multiplied scores. Measured: docs/results.md.
"""

from ml_collections import ConfigDict

from configs.sweeping import Overrides, zipped
from configs.sweeps import small

_SAMPLES = (*small.SAMPLES, "--guidance=1")
EVALUATE = [
    (*_SAMPLES, "--denoise=false,true"),
    *[(*_SAMPLES, f"--denoise_multiplier={multiplier}") for multiplier in (0.5, 1.5, 2.0)],
]
STDS = [0.02, 0.05, 0.1, 0.15, 0.2]


def get_config(variant: str = "") -> ConfigDict:
    """configs/sweeps/small.py and its variants."""
    return small.get_config(variant)


def sweep() -> list[Overrides]:
    """σ of the training noise, in [-1, 1] units; what the first block reads is clipped 5 σ beyond the images."""
    of_noise = zipped({"noise.std": STDS, "model.image_limit": [1.0 + 5.0 * std for std in STDS]})
    return [noise | {"train.seed": seed} for noise in of_noise for seed in small.SEEDS]
