"""Fashion-MNIST, 28x28, class-conditional.

python -m launch.train --config=configs/fashion_mnist.py --workdir=runs/fashion_mnist

FIGURES
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "") -> ConfigDict:
    """The recipe; variants are "likelihood" (uniform dequantisation, no labels) and "smoke" (seconds)."""
    config = common.get_config()
    config.model.update(
        {
            "image_size": (28, 28),
            "image_channels": 1,
            "patch_size": 4,
            "width": 128,
            "num_blocks": 4,
            "layers_per_block": 2,
            "num_classes": 10,
            "position_init": "grid",
            "rotary": True,
            "input_limit": 10.0,
            "image_limit": 1.5,
            "triangular": True,
            "remat": "full",  # on a CPU computing again is faster than keeping (docs/performance.md)
        }
    )
    config.data.source = "fashion_mnist"
    config.noise.std = 0.1
    config.optimizer.update(
        {
            "name": "muon",
            "muon_learning_rate": 5e-3,
            "learning_rate": 3e-3,
            "warmup_steps": 500,
            "clip_norm": 1.0,
        }
    )
    config.train.update(
        {
            "num_steps": 8600,
            "batch_size": 16,  # many steps of few images: docs/optimizers.md
            "drop_label": 0.1,
            "checkpoint_every": 2500,
            "sample_every": 5000,
        }
    )
    config.sample.guidance.weight = 1.0
    return common.with_variant(config, variant)
