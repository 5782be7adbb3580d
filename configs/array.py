"""Tables and sequences, with optional conditions, masks and labels (docs/howto/arrays.md).

python -m launch.train --config=configs/array.py --config.data.source=array:FILE.npz --workdir=runs/array

The shape of the flow follows from the file; width, depth, optimizer and steps are those of `tarflow_jax.fit`.
"""

from ml_collections import ConfigDict

from configs import defaults


def get_config(variant: str = "") -> ConfigDict:
    """Returns the recipe; its variant is "smoke" (runs in seconds)."""
    config = defaults.get_config()
    config.noise.std = 0.0  # arrays get no noise
    config.model.update(
        {
            "width": 64,
            "head_dim": 32,
            "num_blocks": 6,
            "layers_per_block": 1,
            "input_limit": 10.0,
        }
    )
    config.data.source = "array:"
    config.optimizer.update({"warmup_steps": 100, "muon_learning_rate": 1e-2, "weight_decay": 0.1})
    config.train.update({"num_steps": 2000, "batch_size": 256, "checkpoint_every": 200, "evaluate_every": 200})
    return defaults.with_variant(config, variant, defaults.smoke)
