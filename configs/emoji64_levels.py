"""Google's emoji, 64x64 in colour, conditional on 10 categories, at all noise levels (arXiv 2604.20041).

python -m launch.train --config=configs/emoji64_levels.py --workdir=runs/emoji64_levels

Network, optimizer and steps are those of configs/emoji64.py, which says where the images come from. Measured 2026-11-29
(commit b6f3c22, seed 0), float32, one core of an AMD EPYC: 41 minutes; test loss -0.1943 (mean over the levels);
Fréchet distance (judge's features) 347 ± 12 (1,000 samples, constant guidance 2, three sampling seeds). models/emoji64
is this run.
"""

from ml_collections import ConfigDict

from configs import defaults, emoji64


def get_config(variant: str = "") -> ConfigDict:
    """Returns the recipe; the variant is "smoke" (runs in seconds)."""
    config = defaults.levels(emoji64.get_config())
    config.sample.guidance.weight = 2.0
    return defaults.with_variant(config, variant, defaults.smoke)
