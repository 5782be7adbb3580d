"""ImageNet 64x64 for likelihood: uniform dequantisation, float32.

python -m launch.train --config=configs/imagenet64_likelihood.py --workdir=runs/imagenet64_likelihood

Never trained with this code; paper: 16 GPUs, 2.99 bits/dim.
Data: the image-net.org ImageNet64 release. TFDS's downsampled_imagenet/64x64 differs; its figures are not comparable.
"""

from ml_collections import ConfigDict

from configs import defaults

IMAGES, BATCH, EPOCHS = 1281149, 256, 100


def get_config(variant: str = "") -> ConfigDict:
    """Returns the recipe; the variant "tuned" (other optimizer and network: docs/lab/optimizers.md) is unmeasured."""
    config = defaults.get_config()
    config.model.update(
        {
            "image_size": (64, 64),
            "image_channels": 3,
            "patch_size": 2,
            "width": 768,
            "num_blocks": 8,
            "layers_per_block": 8,
            "num_classes": 0,
            "dtype": "float32",
            "remat": "full",
        }
    )
    config.data.update(
        {
            "source": "tfds:downsampled_imagenet/64x64",
            "preprocessing": "none",
            "flip": True,
            "num_workers": 16,
        }
    )
    config.noise.update({"kind": "uniform", "std": 0.0})
    config.optimizer.update(defaults.PAPER_OPTIMIZER, warmup_steps=IMAGES // BATCH)  # one epoch
    config.train.update(
        {
            "num_steps": EPOCHS * IMAGES // BATCH,
            "batch_size": BATCH,
            "checkpoint_every": 5000,
            "sample_every": 20000,
        }
    )
    config.sample.guidance.update({"weight": 0.2, "attention_temperature": 0.3})
    return defaults.with_variant(config, variant, defaults.tuned)
