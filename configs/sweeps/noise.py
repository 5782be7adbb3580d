"""Claim: training with Gaussian noise gives good samples, once they are denoised with the score.

python -m launch.sweep --config=configs/sweeps/noise.py --workdir=runs/noise

Samples at each σ, raw and denoised with several multiples of the score. Measured: docs/results.md.
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
    """Returns configs/sweeps/small.py, or a variant of it."""
    return small.get_config(variant)


def sweep() -> list[Overrides]:
    """Returns runs over the noise's σ, for pixels in [-1, 1]; the first block's input is clipped 5 σ beyond them."""
    of_noise = zipped({"noise.std": STDS, "model.image_limit": [1.0 + 5.0 * std for std in STDS]})
    return [noise | {"train.seed": seed} for noise in of_noise for seed in small.SEEDS]
