"""ImageNet 64x64, class-conditional, in patches of 2 x 2: the command of the reference's README.

python -m launch.prepare_data --data=folder:imagenet --image_size=64 --preprocessing=tarflow
python -m launch.train --config=configs/imagenet64_cond_patch2.py --workdir=DIR --config.data.source=packed:FOLDER

Without `data.source`, the images are those of TFDS's imagenet2012. Never trained with this code. FID of this model by
others: 6.27 (GS-Jacobi's authors, guidance 2.3, as here). Steps from data to FID, and hardware:
docs/howto/imagenet64.md.
"""

from ml_collections import ConfigDict

from configs import defaults, imagenet64_cond

IMAGES, BATCH, EPOCHS = imagenet64_cond.IMAGES, 256, 200


def get_config(variant: str = "") -> ConfigDict:
    """Returns the recipe; the variant "tuned" (other optimizer and network: docs/lab/optimizers.md) is unmeasured."""
    config = imagenet64_cond.get_config()
    config.model.update({"patch_size": 2, "width": 768})
    config.optimizer.warmup_steps = IMAGES // BATCH  # one epoch
    config.train.update({"num_steps": EPOCHS * IMAGES // BATCH, "batch_size": BATCH})
    config.sample.guidance.weight = 2.3
    return defaults.with_variant(config, variant, defaults.tuned)
