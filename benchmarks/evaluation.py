"""Inception in JAX against torch-fidelity: the same weights, the same images, one machine.

    python -m benchmarks.evaluation                 # images/s through the network, both python -m
    benchmarks.evaluation --agreement     # FID and its family, by both (~40 min)

The weights are random, written to a file both read. Needs requirements-dev.txt.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tarflow_jax.evaluation.inception import InceptionV3


def write_random_inception_weights(path: str | Path, seed: int = 0) -> None:
    """A PyTorch file shaped like pt_inception-2015-12-05; its random weights keep the signal's scale."""
    import torch

    random = np.random.default_rng(seed)
    shapes = jax.eval_shape(InceptionV3().init, jax.random.key(0), jnp.zeros((1, 8, 8, 3), jnp.uint8))[
        "params"
    ]
    state = {"fc.weight": random.normal(0, 0.05, (1008, 2048)), "fc.bias": random.normal(0, 0.05, 1008)}
    for keys, kernel in jax.tree_util.tree_leaves_with_path(shapes):
        *names, kind = (key.key for key in keys)
        if kind != "kernel" or names == ["fc"]:
            continue
        name, (rows, columns, inputs, outputs) = ".".join(names), kernel.shape
        scale = np.sqrt(2 / (rows * columns * inputs))
        state[f"{name}.conv.weight"] = random.normal(0, scale, (outputs, inputs, rows, columns))
        state[f"{name}.bn.weight"] = random.uniform(0.9, 1.3, outputs)
        state[f"{name}.bn.bias"] = random.normal(0, 0.2, outputs)
        state[f"{name}.bn.running_mean"] = random.normal(0, 0.2, outputs)
        state[f"{name}.bn.running_var"] = random.uniform(0.8, 1.2, outputs)
        state[f"{name}.bn.num_batches_tracked"] = np.array(1.0)
    torch.save({key: torch.tensor(array, dtype=torch.float32) for key, array in state.items()}, path)
