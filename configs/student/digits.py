"""One pass from noise to digit: a student of the flow that configs/digits.py trains.

python -m launch.distill --workdir=runs/digits --config=configs/student/digits.py

Measured 2026-11-26 (commit fe1eb9a), float32, jax 0.10.2, on 2 cores of an Intel Xeon beside much other work: 6.2
minutes of CPU time, compilation and test errors included, so about 3 minutes of two idle cores. Flow:
configs/digits.py, seed 1. Mean square error of clean test images 0.0155. A classifier of real digits reads 0.990 of
1,000 samples as their label, 0.999 with guidance 1 (the flow's, denoised: 0.977 and 0.998;
benchmarks/digits_judge.py); but guidance costs it precision, which it does not cost the flow (docs/sampling.md).
"""

from ml_collections import ConfigDict

from configs import common as of_all
from configs.student import common


def get_config(variant: str = "") -> ConfigDict:
    """The recipe; the variant is "smoke" (seconds)."""
    config = common.get_config()
    config.student.update({"layers_per_block": (2, 2, 2, 2, 1), "max_guidance": 2.0})
    config.optimizer.update(
        {"name": "muon", "muon_learning_rate": 3e-3, "learning_rate": 3e-3, "warmup_steps": 100, "clip_norm": 1.0}
    )
    config.train.update({"num_steps": 900, "batch_size": 64, "checkpoint_every": 500, "evaluate_every": 300})
    return of_all.with_variant(config, variant, common.smoke)
