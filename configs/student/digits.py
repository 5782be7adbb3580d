"""One pass from noise to digit: a student of the flow that configs/digits.py trains.

python -m launch.distill --workdir=runs/digits --config=configs/student/digits.py
"""

from ml_collections import ConfigDict

from configs.student import common


def get_config(variant: str = "") -> ConfigDict:
    """The recipe; the variant is "smoke" (seconds)."""
    config = common.get_config()
    config.student.update({"layers_per_block": (2, 2, 2, 2, 1), "max_guidance": 2.0})
    config.optimizer.update(
        {"name": "muon", "muon_learning_rate": 3e-3, "learning_rate": 3e-3, "warmup_steps": 100, "clip_norm": 1.0}
    )
    config.train.update({"num_steps": 900, "batch_size": 64, "checkpoint_every": 500, "evaluate_every": 250})
    return common.with_variant(config, variant)
