"""One pass from noise to digit: a student of the flow that configs/digits.py trains.

python -m launch.distill --workdir=runs/digits --config=configs/student/digits.py

Measured 2026-11-26 (commit 538556a), float32, jax 0.10.2, 2 cores of an AMD EPYC shared with other work, so no times:
mean square error of clean test images 0.0155; precision and recall of 500 samples 0.920 and 0.858, with guidance 1
0.960 and 0.631 (the flow's, denoised: 0.842 and 0.891, 0.886 and 0.693; docs/sampling.md). Flow: configs/digits.py,
seed 1. An earlier version (commit fe1eb9a), which learned guidance otherwise, took 6.2 minutes of CPU time on an Intel
Xeon, about 3 minutes of two idle cores; a classifier of real digits read 0.990 of its 1,000 samples as their label.
"""

from ml_collections import ConfigDict

from configs import common as of_all
from configs.student import common


def get_config(variant: str = "") -> ConfigDict:
    """The recipe; the variant is "smoke" (seconds)."""
    config = common.get_config()
    config.student.update({"layers_per_block": (2, 2, 2, 2, 1), "max_guidance": 2.0, "perceptual": 1.0})
    config.optimizer.update(
        {"name": "muon", "muon_learning_rate": 3e-3, "learning_rate": 3e-3, "warmup_steps": 100, "clip_norm": 1.0}
    )
    config.train.update({"num_steps": 900, "batch_size": 64, "checkpoint_every": 500, "evaluate_every": 300})
    return of_all.with_variant(config, variant, common.smoke)
