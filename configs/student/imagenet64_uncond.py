"""One pass from noise to image: a student of the flow that configs/imagenet64_uncond.py trains.

python -m launch.distill --workdir=runs/imagenet64_uncond --config=configs/student/imagenet64_uncond.py

Never trained with this code. Optimizer and batch size are the flow's; a step costs 4/3 of the flow's, so there are 2/3
as many. There is no guidance, which a student can only learn with labels. paper (arXiv 2512.10953): a student of
another flow, at ImageNet 256x256, is 224 to 697 times faster than the flow's inverse, with a better FID.
"""

from ml_collections import ConfigDict

from configs import defaults

IMAGES, BATCH, EPOCHS = 1281149, 256, 133


def get_config(variant: str = "") -> ConfigDict:
    """Returns the recipe; the variant is "smoke" (runs in seconds)."""
    config = defaults.student_config()
    config.student.layers_per_block = (8, 8, 8, 8, 8, 8, 8, 8, 4)
    config.optimizer.update(defaults.PAPER_OPTIMIZER, warmup_steps=IMAGES // BATCH)  # one epoch
    config.train.update({"num_steps": EPOCHS * IMAGES // BATCH, "batch_size": BATCH, "checkpoint_every": 5000})
    return defaults.with_variant(config, variant, defaults.student_smoke)
