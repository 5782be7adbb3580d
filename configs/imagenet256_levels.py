"""ImageNet 256x256, class-conditional, at all noise levels (arXiv 2604.20041).

python -m launch.train --config=configs/imagenet256_levels.py --workdir=runs/imagenet256_levels

Never trained with this code; guidance 4.2 and 70 denoising steps are the paper's.
Data: the ImageNet training images in class folders, packed by launch.prepare_data (data.source=packed:FOLDER).
"""

from ml_collections import ConfigDict

from configs import imagenet64_levels


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = imagenet64_levels.recipe(size=256, patch_size=8, width=2176, std_max=0.7, epochs=600, guidance=4.2)
    config.train.drop_label = 0.0
    return config
