"""One pass from noise to image: a student of the flow that configs/fashion_mnist.py trains.

python -m launch.distill --workdir=runs/fashion_mnist --config=configs/student/fashion_mnist.py

Unmeasured; steps and images a step are such that it should take no longer than the flow.
"""

from ml_collections import ConfigDict

from configs import common as of_all
from configs.student import common


def get_config(variant: str = "") -> ConfigDict:
    """The recipe; the variant is "smoke" (seconds)."""
    config = common.get_config()
    config.student.update({"layers_per_block": (2, 2, 2, 2, 1), "max_guidance": 1.0, "perceptual": 1.0})
    config.optimizer.update(
        {"name": "muon", "muon_learning_rate": 3e-3, "learning_rate": 3e-3, "warmup_steps": 300, "clip_norm": 1.0}
    )
    config.train.update({"num_steps": 4500, "batch_size": 16, "checkpoint_every": 1500})
    return of_all.with_variant(config, variant, common.smoke)
