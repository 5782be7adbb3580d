"""Google's emoji, 64x64 in colour, conditional on 10 categories, at all noise levels (arXiv 2604.20041).

python -m launch.train --config=configs/emoji64_levels.py --workdir=runs/emoji64_levels

Network, optimizer and steps are those of configs/emoji64.py, which says where the images come from. Measured 2026-11-27
(commit 79c37d2, seed 2), float32: test loss -0.1942 (mean over the levels); Fréchet distance (classifier features) 370
(1,000 samples, constant guidance 2, denoised in one step). A run of another seed took 39 minutes on one core of an
AMD EPYC. docs/emoji64.png and docs/lab/noise_levels.md show samples.
"""

from ml_collections import ConfigDict

from configs import defaults, emoji64


def get_config(variant: str = "") -> ConfigDict:
    """Returns the recipe; the variant is "smoke" (runs in seconds)."""
    config = defaults.levels(emoji64.get_config())
    config.sample.guidance.weight = 2.0
    return defaults.with_variant(config, variant, defaults.smoke)
