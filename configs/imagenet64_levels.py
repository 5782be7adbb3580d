"""ImageNet 64x64, class-conditional, at all noise levels (arXiv 2604.20041).

python -m launch.train --config=configs/imagenet64_levels.py --workdir=runs/imagenet64_levels

Never trained with this code; paper: FID 1.68 with guidance 2.1 and 30 denoising steps.
Data: the ImageNet training images in class folders, packed by launch.prepare_data (data.source=packed:FOLDER).
"""

from ml_collections import ConfigDict

from configs import defaults

IMAGES, BATCH = 1281167, 512


def get_config() -> ConfigDict:
    """Returns the recipe."""
    return recipe(size=64, patch_size=2, width=1280, std_max=0.3, epochs=300, guidance=2.1)


def recipe(*, size: int, patch_size: int, width: int, std_max: float, epochs: int, guidance: float) -> ConfigDict:
    """Returns the recipe that the paper's three sizes share, with the deep block nearest the noise."""
    config = defaults.get_config()
    config.model.update(
        {
            "image_size": (size, size),
            "image_channels": 3,
            "patch_size": patch_size,
            "width": width,
            "num_blocks": 4,
            "num_classes": 1000,
            "noise_conditional": True,
            "dtype": "bfloat16",
            "remat": "full",
        }
    )
    with config.model.ignore_type():  # a depth for each block
        config.model.layers_per_block = (4, 4, 4, 24)
    config.data.update({"source": "tfds:imagenet2012", "preprocessing": "tarflow", "flip": True, "num_workers": 16})
    config.noise.update({"kind": "levels", "std": 0.0, "std_min": 0.01, "std_max": std_max})
    config.optimizer.update(
        defaults.PAPER_OPTIMIZER, warmup_steps=IMAGES // BATCH, final_learning_rate=1e-5
    )  # one epoch
    config.train.update(
        {
            "num_steps": epochs * IMAGES // BATCH,
            "batch_size": BATCH,
            "drop_label": 0.1,
            "checkpoint_every": 5000,
            "sample_every": 20000,
        }
    )
    config.sample.guidance.update({"weight": guidance, "rule": "scale"})
    return config
