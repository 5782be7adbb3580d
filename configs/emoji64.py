"""Google's emoji, 64x64 in colour, conditional on 10 categories, from a public npm package.

npm pack emoji-datasource-google@16.0.0
python -m launch.prepare_data --data=emoji64:emoji-datasource-google-16.0.0.tgz
python -m launch.train --config=configs/emoji64.py --workdir=runs/emoji64

Measured 2026-11-27 (commit 79c37d2), float32, one core of an AMD EPYC: test loss -1.683 (seeds 2 to 5); Fréchet
distance by a former classifier 421 (seed 2; 1,000 samples, constant guidance 3, denoised), where a run of
configs/emoji64_levels.py has 370. The steps take as long as 5,000 steps of AdamW, which took 22 minutes on 2 cores of
an Intel Xeon. Guidance improves the distance most (docs/lab/optimizers.md).
"""

from ml_collections import ConfigDict

from configs import defaults


def get_config(variant: str = "") -> ConfigDict:
    """The recipe; variants are "likelihood" (uniform dequantisation, no labels) and "smoke" (seconds)."""
    config = defaults.get_config()
    config.model.update(
        {
            "image_size": (64, 64),
            "image_channels": 3,
            "patch_size": 4,
            "width": 128,
            "num_blocks": 4,
            "layers_per_block": 2,
            "num_classes": 10,
            "position_init": "grid",
            "rotary": True,
            "input_limit": 10.0,
            "image_limit": 1.5,
            "remat": "full",  # on a CPU computing again is faster than keeping (docs/lab/performance.md)
        }
    )
    # No flips: letters, flags and arrows would come out mirrored.
    config.data.update({"source": "emoji64", "num_workers": 1})
    config.noise.std = 0.1
    config.optimizer.warmup_steps = 300
    config.train.update(
        {
            # Small batches: to heed the row above takes many steps more than many images.
            "num_steps": 4200,
            "batch_size": 8,
            "drop_label": 0.1,
            "checkpoint_every": 500,
            "sample_every": 1000,
        }
    )
    config.sample.guidance.update({"weight": 3.0, "schedule": "constant"})
    return defaults.with_variant(config, variant)
