"""`fit`: a flow of arrays, from the arrays, in one call."""

import logging
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from tarflow_jax.errors import UserError
from tarflow_jax.flow import TarFlowConfig
from tarflow_jax.pipeline import TarFlowPipeline, lengths_of
from tarflow_jax.runtime import BatchRunner, Rows, make_mesh
from tarflow_jax.training.optimizer import Optimizer
from tarflow_jax.training.step import TrainConfig, compiled_step, new_state
from tarflow_jax.training.task import Arrays, ArrayTask

SHAPE = {"width": 64, "head_dim": 32, "num_blocks": 6, "layers_per_block": 1, "input_limit": 10.0}
NUM_VALIDATIONS, PATIENCE = 40, 10
ROUNDING = 1e-4  # of a standard deviation, that float32 may cost in silence
logger = logging.getLogger(__name__)


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
    **shape: Any,
) -> TarFlowPipeline:
    """Fits a flow to arrays by maximum likelihood, with Muon, and keeps the parameters of the best validation.

    Each column's mean and standard deviation become part of the model, so that densities and samples are in the units
    of `x`. The flow computes in float32.

    Args:
      x: float [N, F], a table, or [N, T, D], sequences of T tokens.
      condition: float [N, C], or [N, T, C], one for each token, which is seen for that token and the one before.
      mask: of sequences, bool [N, T], True where there is a token; padding comes last. Or the lengths, int [N].
      labels: int [N], the classes, from 0.
      num_steps: at most; training ends when ten validations in a row, of forty, are no better.
      batch_size: rows of a step.
      key: of the initial weights, the batches and the split; None is `jax.random.key(0)`.
      validation: share of the rows that is held out; 0 for none.
      drop_condition: share of the rows trained without label and condition, for guidance.
      shape: fields of `TarFlowConfig`, such as width, num_blocks or orders.

    Returns:
      The flow; `card["validation"]` has the mean log p of the rows held out, in nats, and its step.

    Raises:
      ValueError: numbers that are not finite, constant columns, shapes that do not fit, a mask with holes.
    """
    data = _checked(x, condition, mask, labels)
    config = TarFlowConfig(**SHAPE | data.shape | shape)
    rng_key, init_key, step_key = jax.random.split(jax.random.key(0) if key is None else key, 3)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(rng_key)))
    held_out, rows = np.split(rng.permutation(len(data.arrays.x)), [math.ceil(validation * len(data.arrays.x))])
    batch_size = min(batch_size, len(rows))
    devices = jax.local_devices()
    mesh = make_mesh(devices=devices[: math.gcd(batch_size, len(devices))])
    task = ArrayTask(config, drop_condition)
    train_config = TrainConfig(task, Optimizer(num_steps, warmup_steps=max(num_steps // 20, 1)))
    state, step = new_state(train_config, mesh, init_key), compiled_step(train_config, mesh)
    constants = dict(state.variables["constants"])
    for name, values in data.units.items():
        values = np.broadcast_to(values, constants[name].shape).astype(np.float32)
        constants[name] = jax.device_put(values, constants[name].sharding)
    state = state.replace(variables={**state.variables, "constants": constants})

    put, runner = Rows(mesh, batch_size).put, BatchRunner(mesh)
    best, best_variables = {"log_prob": -math.inf, "step": 0}, None
    check_every = max(num_steps // NUM_VALIDATIONS, 1)
    batches = _batches(rng, rows, batch_size)
    with tqdm(range(1, num_steps + 1), "fit", unit="step", disable=None) as bar:
        for number in bar:
            state, metrics = step(state, *jax.tree.map(put, data.rows(next(batches))), step_key)
            if number % check_every and number != num_steps:
                continue
            if not math.isfinite(float(metrics["loss"])):
                raise UserError(f"the loss is not finite at step {number}; look for outliers in x")
            if not len(held_out):
                continue
            log_prob = -task.test_loss(runner, state.variables, data.rows(held_out))
            bar.set_postfix_str(f"validation {log_prob:.4g} nats")
            if log_prob > best["log_prob"]:
                best = {"log_prob": log_prob, "step": number}
                best_variables = jax.device_get(state.variables)
            elif number - best["step"] >= PATIENCE * check_every:
                break
    if best_variables is None:
        return TarFlowPipeline(config, jax.device_get(state.variables))
    return TarFlowPipeline(config, best_variables, card={"validation": best})


class _Data(NamedTuple):
    """Checked arrays, and what follows from them."""

    arrays: Arrays  # [N, …]
    labels: np.ndarray | None  # int32 [N]
    shape: dict[str, Any]  # fields of TarFlowConfig
    units: dict[str, np.ndarray]  # the flow's constants

    def rows(self, numbers: np.ndarray) -> tuple[Arrays, Any]:
        """The rows of these numbers, and their labels."""
        arrays = Arrays(*(None if values is None else values[numbers] for values in self.arrays))
        return arrays, None if self.labels is None else self.labels[numbers]


def _checked(x: Any, condition: Any, mask: Any, labels: Any) -> _Data:
    """Checks the arguments of `fit`."""
    x = np.asarray(x)
    if x.ndim not in (2, 3) or not np.issubdtype(x.dtype, np.floating) or 0 in x.shape:
        raise UserError(f"x is {x.dtype} {list(x.shape)}; expected floats [N, F] or [N, T, D]")
    count, num_tokens = x.shape[:2]
    of_sequences = x.ndim == 3
    if num_tokens == 1:
        raise UserError(f"x has shape {list(x.shape)}: a flow cannot change a single token; expected F or T from 2")
    if mask is not None and not of_sequences:
        raise UserError("a mask is for sequences [N, T, D]; x is a table")
    lengths = None if mask is None else lengths_of(mask, count, num_tokens)
    exists = None if lengths is None else np.arange(num_tokens)[None] < lengths[:, None]
    shape: dict[str, Any] = {"sequence_shape": (num_tokens, x.shape[2] if of_sequences else 0)}
    mean, std = _units("x", x, exists)
    units = {"mean": mean, "std": std} if of_sequences else {"mean": mean[:, None], "std": std[:, None]}
    if labels is not None:
        labels = np.asarray(labels)
        if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
            raise UserError(f"labels are {labels.dtype} {list(labels.shape)}; expected integers [{count}] from 0")
        shape["num_classes"] = int(labels.max()) + 1
        labels = labels.astype(np.int32)
    if condition is not None:
        condition = np.asarray(condition, np.float32)
        by_token = condition.ndim == 3
        if condition.ndim not in (2, 3) or condition.shape[:-1] != x.shape[: condition.ndim - 1]:
            raise UserError(
                f"condition has shape {list(condition.shape)}; expected [{count}, C] or [{count}, {num_tokens}, C]"
            )
        shape |= {"condition_dim": condition.shape[-1], "condition_kind": "tokens" if by_token else "vector"}
        mean, std = _units("condition", condition, exists if by_token else None)
        units |= {"condition_mean": mean, "condition_std": std}
    return _Data(Arrays(x.astype(np.float32), condition, lengths), labels, shape, units)


def _units(name: str, x: np.ndarray, exists: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each column of x [N, …, columns], over the tokens that exist, bool [N, T].

    Raises ValueError for numbers that are not finite, and for constant columns.
    """
    wrong = ~np.isfinite(x) if exists is None else ~np.isfinite(x) & exists[..., None]
    if wrong.any():
        row, *_, column = where = np.argwhere(wrong)[0]
        raise UserError(f"{name} is {x[tuple(where)]} in row {row}, column {column}; expected finite numbers")
    values = x.reshape(-1, x.shape[-1]) if exists is None else x[exists]
    mean, std = values.mean(0, dtype=np.float64), values.std(0, dtype=np.float64)
    rounding = np.finfo(np.float32).eps * np.abs(values).max(0)
    if (constant := np.flatnonzero(std <= rounding)).size:
        raise UserError(f"{name} is constant in column {constant[0]} ({mean[constant[0]]:g}); leave it out")
    if (rounded := np.flatnonzero(rounding > ROUNDING * std)).size:
        logger.warning(
            "float32 rounds column %d of %s to %.0e of its standard deviation; subtract its mean before",
            rounded[0],
            name,
            (rounding / std)[rounded[0]],
        )
    return mean, std


def _batches(rng: np.random.Generator, rows: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """Yields row numbers [batch_size] without end, each row at most once an epoch."""
    while True:
        shuffled = rng.permutation(rows)
        yield from shuffled[: len(rows) // batch_size * batch_size].reshape(-1, batch_size)
