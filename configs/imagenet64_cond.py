"""ImageNet 64x64, class-conditional, in patches of 4 x 4.

python -m launch.prepare_data --data=folder:imagenet --image_size=64 --preprocessing=tarflow
python -m launch.train --config=configs/imagenet64_cond.py --workdir=DIR --config.data.source=packed:FOLDER

Without `data.source`, the images are those of TFDS's imagenet2012. Never trained with this code. FID of this model by
others: 3.99 (the paper's author, guidance 1.7), 4.42 (GS-Jacobi's authors, guidance 2, as here). Steps from data to
FID, and hardware: docs/howto/imagenet64.md.
"""

from ml_collections import ConfigDict

from configs import defaults

IMAGES, BATCH, EPOCHS = 1281167, 480, 300


def get_config(variant: str = "") -> ConfigDict:
    """Returns the recipe; the variant "tuned" (other optimizer and network: docs/lab/optimizers.md) is unmeasured."""
    config = defaults.get_config()
    config.model.update(
        {
            "image_size": (64, 64),
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
    config.noise.update({"kind": "gaussian", "std": 0.05})
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
    config.sample.guidance.weight = 2.0
    return defaults.with_variant(config, variant, defaults.tuned)
