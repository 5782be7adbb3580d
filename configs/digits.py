"""Handwritten digits, 8x8, class-conditional: trains on any laptop.

python -m launch.train --config=configs/digits.py --workdir=runs/digits

Measured 2026-11-26 (commit 95cf614), float32, jax 0.10.2, 2 otherwise idle cores of an Intel Xeon (512-bit units, 2 MB
of level-2 cache per core): 1.3 minutes with compilation and figures; test loss -1.0765 ± 0.003 (seeds 1 to 5), still
falling at the end. A classifier of real digits (accuracy 0.993 on the test digits; benchmarks/digits_classifier.py)
assigns 0.978 of 1,000 denoised samples to their label, 0.999 with guidance 1.

The likelihood variant (configs/digits.py:likelihood), 2026-11-29 (commit 916a821), on one core of an AMD EPYC: 4.72
bits/dim on the 297 test images (mean of seeds 1 to 3, 4.68 to 4.74; standard error 0.03 to 0.06). With seed 0, a single
image lifts it to 5.17.
"""

from ml_collections import ConfigDict

from configs import defaults


def get_config(variant: str = "") -> ConfigDict:
    """Returns the recipe; variants are "likelihood" (uniform dequantisation, no labels) and "smoke" (seconds)."""
    config = defaults.get_config()
    config.model.update(
        {
            "image_size": (8, 8),
            "image_channels": 1,
            "patch_size": 2,
            "width": 128,
            "num_blocks": 4,
            "layers_per_block": 2,
            "num_classes": 10,
            "position_init": "grid",
            "rotary": True,
            "input_limit": 10.0,
            "image_limit": 1.5,
            "triangular": True,
            "remat": "full",  # faster on a CPU (docs/lab/performance.md)
        }
    )
    config.data.source = "digits"
    config.noise.std = 0.1
    config.optimizer.update(
        {
            "muon_learning_rate": 3e-3,
            "warmup_steps": 70,
            "weight_decay": 0.1,  # 1,500 images, each seen 15 times
        }
    )
    config.train.update(
        {
            "num_steps": 700,
            "batch_size": 32,
            "drop_label": 0.1,
            "checkpoint_every": 350,
            "sample_every": 350,
        }
    )
    config.sample.guidance.weight = 1.0
    return defaults.with_variant(config, variant, likelihood, defaults.smoke)


def likelihood(config: ConfigDict) -> ConfigDict:
    """Applies the variant for bits per dimension. With triangular maps, single test images take 12 to 53 bits/dim."""
    config = defaults.likelihood(config)
    config.model.triangular = False
    return config
