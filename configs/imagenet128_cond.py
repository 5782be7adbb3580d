"""ImageNet 128x128, class-conditional.

python -m launch.train --config=configs/imagenet128_cond.py --workdir=runs/imagenet128_cond

Never trained with this code; paper: 32 GPUs, FID 5.03.
Data: the ImageNet training images in class folders, packed by launch.prepare_data (data.source=packed:FOLDER).
"""

from ml_collections import ConfigDict

from configs import defaults

IMAGES, BATCH, EPOCHS = 1281167, 768, 320


def get_config(variant: str = "") -> ConfigDict:
    """Returns the recipe; the variant "tuned" (other optimizer and network: docs/lab/optimizers.md) is unmeasured."""
    config = defaults.get_config()
    config.model.update(
        {
            "image_size": (128, 128),
            "image_channels": 3,
            "patch_size": 4,
            "width": 1024,
            "num_blocks": 8,
            "layers_per_block": 8,
            "num_classes": 1000,
            "dtype": "bfloat16",
            "remat": "full",
        }
    )
    config.data.update({"source": "tfds:imagenet2012", "preprocessing": "tarflow", "flip": True, "num_workers": 16})
    config.noise.update({"kind": "gaussian", "std": 0.15})
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
    config.sample.guidance.weight = 1.5
    config.sample.denoise_multiplier = 0.97
    return defaults.with_variant(config, variant, defaults.tuned)
