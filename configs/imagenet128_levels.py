"""ImageNet 128x128, class-conditional, at all noise levels (arXiv 2604.20041).

python -m launch.train --config=configs/imagenet128_levels.py --workdir=runs/imagenet128_levels

Never trained with this code; guidance 3.7 and 50 denoising steps are the paper's.
Data: the ImageNet training images in class folders, packed by launch.prepare_data (data.source=packed:FOLDER).
"""

from ml_collections import ConfigDict

from configs import imagenet64_levels


def get_config() -> ConfigDict:
    """Returns the recipe."""
    return imagenet64_levels.recipe(size=128, patch_size=4, width=1600, std_max=0.5, epochs=450, guidance=3.7)
