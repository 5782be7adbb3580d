"""What a tiny model computes on a mesh: for tests, and as a program for one of several processes.

python tests/runs.py OUT.json
"""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np

from tarflow_jax import Guidance, Noise, TarFlowPipeline
from tarflow_jax.data import ArraySource
from tarflow_jax.runtime import BatchRunner, LocalBatch, make_mesh, start_processes
from tarflow_jax.scoring import image_bits_per_dim
from tarflow_jax.training import FlowTask, TrainConfig
from tarflow_jax.training.optimizer import Optimizer
from tarflow_jax.training.step import compiled_step, jitted_step, new_state
from tiny_models import TINY, random_variables

BATCH_SIZE = 16
SMALL = dataclasses.replace(TINY, num_blocks=2, layers_per_block=1)


def random_images(config, count, seed=0):
    """uint8 [count, H, W, K] and int32 [count]."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, *config.image_shape), np.uint8)
    return images, rng.integers(0, max(config.num_classes, 1), count).astype(np.int32)


def run_steps(config, mesh, count, *, accumulation=1, ema_decay=0.0, **optimizer):
    """The losses and the last state of `count` steps on fixed random 8-bit images."""
    chosen = {"name": "adamw", "muon_learning_rate": 0.0, **optimizer}
    optimizer = Optimizer(count, 1e-4, 1e-4, 0, 0.9, 0.999, 1e-4, 0.0, ema_decay, **chosen)  # no loss comes near 0
    train_config = TrainConfig(FlowTask(config, Noise("gaussian", 0.1), drop_label=0.2), optimizer, accumulation)
    state, step = new_state(train_config, mesh, jax.random.key(0)), compiled_step(train_config, mesh)
    rows, losses = LocalBatch(mesh, BATCH_SIZE), []
    for i in range(count):
        batch = (rows.put(values[rows.local]) for values in random_images(config, BATCH_SIZE, i))
        state, metrics = step(state, *batch, jax.random.key(1))
        losses.append(float(metrics["loss"]))
    assert int(state.step) == count
    assert jitted_step(train_config, mesh)._cache_size() == 1
    assert set(metrics) == {"loss", "half_mean_z2", "log_det_per_dim", "block_norms", "grad_norm"}
    return losses, state


def bits_per_dim(mesh):
    """Of 21 images, which no number of devices divides."""
    runner = BatchRunner(mesh)
    variables = runner.place(random_variables(SMALL))
    source = ArraySource("noise", *random_images(SMALL, 21), SMALL.num_classes)
    bits = image_bits_per_dim(runner, SMALL, variables, source, jax.random.key(0))
    return float(bits.mean())


def samples(mesh):
    """Five images, guided and denoised."""
    pipe = TarFlowPipeline(SMALL, random_variables(SMALL), Noise("gaussian", 0.1), mesh=mesh)
    return np.asarray(pipe.sample(jax.random.key(3), 5, [0, 1, 2, -1, 0], Guidance(weight=1.0)))


def figures(mesh):
    """All of it, as JSON has it."""
    losses, _ = run_steps(SMALL, mesh, 20)
    return {"losses": losses, "bits_per_dim": bits_per_dim(mesh), "samples": samples(mesh).tolist()}


def assert_same(found, expected):
    """Losses and bits/dim within 1e-5, relative; pixels, which lie around [-1, 1], within 1e-5."""
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=1e-5)
    np.testing.assert_allclose(found["bits_per_dim"], expected["bits_per_dim"], rtol=1e-5)
    np.testing.assert_allclose(found["samples"], expected["samples"], atol=1e-5)


if __name__ == "__main__":
    start_processes()
    # Heads are cut between processes, so that both read every row of the batch.
    devices = np.array(jax.devices()).reshape(jax.process_count(), -1).T.ravel()
    found = figures(make_mesh(2, 2, 2, devices=list(devices)))
    if jax.process_index() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
