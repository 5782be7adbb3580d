"""AFHQ 256x256 (cat, dog, wild), class-conditional.

python -m launch.train --config=configs/afhq256_cond.py --workdir=runs/afhq256_cond

Never trained with this code; paper: 8 GPUs, reproduced FID 13.60.
Data: a folder per class; packed by launch.prepare_data, it reads faster (data.source=packed:FOLDER).
"""

from ml_collections import ConfigDict

from configs import defaults

IMAGES, BATCH, EPOCHS = 14630, 256, 4000


def get_config(variant: str = "") -> ConfigDict:
    """Returns the recipe; the variant "tuned" (other optimizer and network: docs/lab/optimizers.md) is unmeasured."""
    config = defaults.get_config()
    config.model.update(
        {
            "image_size": (256, 256),
            "image_channels": 3,
            "patch_size": 8,
            "width": 768,
            "num_blocks": 8,
            "layers_per_block": 8,
            "num_classes": 3,
            "dtype": "bfloat16",
            "remat": "full",
        }
    )
    config.data.update({"source": "folder:data/afhq", "preprocessing": "tarflow", "flip": True, "num_workers": 16})
    config.noise.update({"kind": "gaussian", "std": 0.07})
    config.optimizer.update(defaults.PAPER_OPTIMIZER, warmup_steps=IMAGES // BATCH)  # one epoch
    config.train.update(
        {
            "num_steps": EPOCHS * IMAGES // BATCH,
            "batch_size": BATCH,
            "drop_label": 0.1,
            "checkpoint_every": 5000,
            "sample_every": 20000,
        }
    )
    config.sample.guidance.weight = 3.4
    config.sample.denoise_multiplier = 1.4
    return defaults.with_variant(config, variant, defaults.tuned)
