"""`fit`: fits a flow to arrays in one call."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from tarflow_jax.data import Arrays, SequenceSource
from tarflow_jax.errors import UserError
from tarflow_jax.flow import TarFlowConfig
from tarflow_jax.pipeline import TarFlowPipeline
from tarflow_jax.runtime import BatchRunner, LocalBatch, make_mesh
from tarflow_jax.training.optimizer import Optimizer
from tarflow_jax.training.step import TrainConfig, compiled_step, new_state
from tarflow_jax.training.task import ArrayTask

SHAPE = {"width": 64, "head_dim": 32, "num_blocks": 6, "layers_per_block": 1, "input_limit": 10.0}
MUON_RATE = 1e-2  # half and twice this were worse on moons, half on two other densities
NUM_VALIDATIONS, PATIENCE = 40, 20  # less patience would end fits before the learning rate has decayed


def fit(
    x: Any,
    condition: Any = None,
    mask: Any = None,
    labels: Any = None,
    *,
    num_steps: int = 2000,
    batch_size: int = 256,
    key: jax.Array | None = None,
    validation: float = 0.1,
    drop_condition: float = 0.0,
    weight_decay: float = 0.1,
    noise: float = 0.0,
    **shape: Any,
) -> TarFlowPipeline:
    """Fits a flow to arrays by maximum likelihood with Muon, and keeps the parameters of the best validation.

    Each column's mean and standard deviation become part of the model, so that densities and samples are in the units
    of `x`. The flow computes in float32.

    Args:
      x: float [N, F], a table, or [N, T, D], sequences of T tokens.
      condition: float [N, C], or [N, T, C] with one per token, seen at that token and the one before.
      mask: of sequences, bool [N, T], True for tokens; padding comes last. Or the lengths, int [N].
      labels: classes, int [N] from 0.
      num_steps: maximum number of steps; training stops after 20 validations (of 40) in a row without improvement.
      batch_size: rows per step.
      key: for the initial weights, the batches and the split; None is `jax.random.key(0)`.
      validation: fraction of the rows held out; 0 for none.
      drop_condition: fraction of the rows trained without label and condition, for guidance.
      weight_decay: larger (1) suits smooth densities, smaller (0.03) sharp ones.
      noise: standard deviation of Gaussian noise that each batch gets anew, as a fraction of each column's. It blurs
        the density, but with fewer than 1,000 rows 0.2 to 0.3 keeps the flow from learning them by heart.
      shape: fields of `TarFlowConfig`, such as width, num_blocks or orders.

    Returns:
      The flow; `card["metrics"]` has the mean log p of the held-out rows, in nats.

    Raises:
      ValueError: values that are not finite, constant columns, mismatched shapes, a mask with holes, or negative noise.
    """
    if not (math.isfinite(noise) and noise >= 0):
        raise UserError(f"noise is {noise}; expected a standard deviation, 0 or more")
    data = SequenceSource(x, condition, mask, labels)
    config = TarFlowConfig(**SHAPE | data.shape | shape)
    rng_key, *keys = jax.random.split(jax.random.key(0) if key is None else key, 3)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(rng_key)))
    held_out, rows = np.split(rng.permutation(len(data)), [math.ceil(validation * len(data))])
    batch_size = min(batch_size, len(rows))
    units, task = data.units, ArrayTask(config, drop_condition)
    std = noise * (units["std"] if data.arrays.x.ndim == 3 else units["std"][:, 0])
    batches = _batches(rng, data, rows, batch_size, std)
    split = data.take(held_out) if len(held_out) else None
    optimizer = fit_optimizer(num_steps, weight_decay)
    variables, loss, step = fit_loop(task, batches, split, optimizer, batch_size, keys, units)
    metrics = {} if split is None else {"log p of rows held out (nats)": -loss}
    return TarFlowPipeline(config, variables, card={"training": {"steps": step}, "metrics": metrics})


def fit_optimizer(num_steps: int, weight_decay: float) -> Optimizer:
    """Returns Muon with a warm-up of a twentieth of the steps."""
    warmup = max(num_steps // 20, 1)
    return Optimizer(num_steps, warmup_steps=warmup, weight_decay=weight_decay, muon_learning_rate=MUON_RATE)


def fit_loop(
    task: ArrayTask,
    batches: Iterator,
    held_out: Any,
    optimizer: Optimizer,
    batch_size: int,
    keys: Sequence,
    units: Mapping,
) -> tuple[Any, float, int]:
    """Trains on all devices of this process, until 20 test losses (of 40) in a row bring no improvement.

    `batches` yields (arrays, labels) forever. `keys` seed the initial weights and the steps' draws.

    Returns (variables, loss, step): those of the lowest test loss, or the last ones if nothing is held out.
    """
    devices = jax.local_devices()
    mesh = make_mesh(devices=devices[: math.gcd(batch_size, len(devices))])
    train_config, num_steps = TrainConfig(task, optimizer), optimizer.num_steps
    state, step = new_state(train_config, mesh, keys[0], {"constants": units}), compiled_step(train_config, mesh)
    put, runner = LocalBatch(mesh, batch_size).put, BatchRunner(mesh)
    best: tuple[Any, float, int] = None, math.inf, 0
    check_every = max(num_steps // NUM_VALIDATIONS, 1)
    with tqdm(range(1, num_steps + 1), "fit", unit="step", disable=None) as bar:
        for number in bar:
            state, metrics = step(state, *jax.tree.map(put, next(batches)), keys[1])
            if number % check_every and number != num_steps:
                continue
            if not math.isfinite(float(metrics["loss"])):
                raise UserError(f"the loss is not finite at step {number}; look for outliers in x, or where p is 0")
            if held_out is None:
                continue
            loss = task.test_loss(runner, state.variables, held_out)
            bar.set_postfix_str(f"validation loss {loss:.4g} nats")
            if loss < best[1]:
                best = jax.device_get(state.variables), loss, number
            elif number - best[2] >= PATIENCE * check_every:
                break
    return (jax.device_get(state.variables), math.nan, num_steps) if best[0] is None else best


def _batches(
    rng: np.random.Generator, data: SequenceSource, rows: np.ndarray, batch_size: int, noise_std: np.ndarray
) -> Iterator[tuple[Arrays, np.ndarray | None]]:
    """Yields noisy rows and their labels forever, each row at most once per epoch."""
    while True:
        shuffled = rng.permutation(rows)
        for batch in shuffled[: len(rows) // batch_size * batch_size].reshape(-1, batch_size):
            arrays, labels = data.read(batch)
            if noise_std.any():
                noise = noise_std * rng.normal(size=arrays.x.shape)
                arrays = arrays._replace(x=arrays.x + noise.astype(np.float32))
            yield arrays, labels
