"""The toy of docs/results.md's sweeps: configs/fashion_mnist.py at half its width, for 1,000 of its 8,600 steps.

A run takes about two minutes on one core (docs/results.md), so a claim can be tested with three seeds.
"""

from ml_collections import ConfigDict

from configs import defaults, fashion_mnist

SEEDS = [1, 2, 3]  # seed 0 was used to tune learning rates (docs/lab/optimizers.md)
SAMPLES = ("--metrics=fid,precision_recall", "--num_samples=2500")  # what launch.evaluate measures of samples


def get_config(variant: str = "") -> ConfigDict:
    """Returns the recipe; variants are "likelihood" (uniform dequantisation, no labels) and "smoke" (seconds)."""
    config = fashion_mnist.get_config()
    config.model.width = 64
    config.optimizer.warmup_steps = 100
    config.train.update({"num_steps": 1000, "checkpoint_every": 250, "keep_checkpoints": 4, "sample_every": 0})
    return defaults.with_variant(config, variant)
