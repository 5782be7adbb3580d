"""`fit_density`: fits a flow to an unnormalised density, without data."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tarflow_jax.errors import UserError
from tarflow_jax.fitting import SHAPE, fit_loop, fit_optimizer
from tarflow_jax.flow import TarFlow, TarFlowConfig
from tarflow_jax.pipeline import TarFlowPipeline
from tarflow_jax.runtime import BatchRunner, device_flow, in_float32
from tarflow_jax.runtime.batch_runner import forward_bytes
from tarflow_jax.sampling import decode_log_prob
from tarflow_jax.training.task import Arrays, ArrayTask, Batch, Metrics, Variables

NUM_FIXED = 1024  # latents of the test loss


def fit_density(
    log_density: Callable[[jax.Array], jax.Array],
    shape: int | tuple[int, ...],
    *,
    num_steps: int = 2000,
    batch_size: int = 256,
    key: jax.Array | None = None,
    **flow_shape: Any,
) -> TarFlowPipeline:
    """Fits a flow q to a density p̃ / Z by the reverse Kullback-Leibler divergence, E_q[log q(x) - log p̃(x)] + log Z.

    The divergence is mode-seeking: q can miss modes of p̃ at no cost, and `importance` does not detect that either.
    Training starts from a standard normal q, so scale x such that p̃ has most of its mass within a few units of 0.

    A step decodes latents token by token, in T - 1 passes through each block, and the backward pass keeps a KV cache
    for each pass: memory grows with T². docs/howto/arrays.md has timings.

    Args:
      log_density: log p̃ of x [B, …], float32 [B]; differentiable in JAX and finite everywhere.
      shape: of x: F or (F,) for a row of a table, (T, D) for a sequence.
      num_steps: maximum number of steps, see `fit`.
      batch_size: samples per step.
      key: for the initial weights and the latents; None is `jax.random.key(0)`.
      flow_shape: fields of `TarFlowConfig`, see `fit`.

    Returns:
      The flow with the lowest loss on fixed latents; `card["metrics"]` has that loss, KL - log Z, in nats.

    Raises:
      ValueError: log_density returns another shape, or values that are not finite.
    """
    tokens, *numbers = (shape,) if isinstance(shape, int) else shape
    of_data: dict[str, Any] = {"sequence_shape": (tokens, *(numbers or [0])), "start_token": tokens == 1}
    config = TarFlowConfig(**SHAPE | of_data | flow_shape)
    found = jax.eval_shape(log_density, jax.ShapeDtypeStruct((batch_size, *config.data_shape), jnp.float32))
    if getattr(found, "shape", None) != (batch_size,):
        raise UserError(f"log_density returned {found}; expected an array of shape [{batch_size}]")
    rng_key, *keys = jax.random.split(jax.random.key(0) if key is None else key, 3)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(rng_key)))

    def latents(count: int) -> tuple[Arrays, None]:
        return Arrays(rng.standard_normal((count, *config.data_shape), np.float32)), None

    task, fixed = DensityTask(config, log_density=log_density), latents(NUM_FIXED)
    batches = map(latents, itertools.repeat(batch_size))
    optimizer = fit_optimizer(num_steps, weight_decay=0.0)  # every batch is new
    variables, loss, step = fit_loop(task, batches, fixed, optimizer, batch_size, keys, {})
    return TarFlowPipeline(
        config, variables, card={"training": {"steps": step}, "metrics": {"KL - log Z (nats)": loss}}
    )


@dataclasses.dataclass(frozen=True)
class DensityTask(ArrayTask):
    """Minimises the reverse KL divergence; its arrays are latents."""

    log_density: Callable[[jax.Array], jax.Array] = jnp.zeros_like

    def loss(self, variables: Variables, batch: Batch, frozen: None) -> tuple[jax.Array, tuple[Metrics, Any]]:
        x, log_q = decode_log_prob(TarFlow(self.model), variables, batch[0])
        loss = (log_q - self.log_density(x)).mean()
        return loss, ({"loss": loss}, None)

    def test_loss(self, runner: BatchRunner, variables: Variables, source: Any, frozen: None = None) -> float:
        """Returns the mean of log q - log p̃, in nats."""
        decode = functools.partial(decode_log_prob, device_flow(in_float32(self.model)))
        x, log_q = runner.run(decode, variables, {"latents": source[0].x}, bytes_per_image=forward_bytes(self.model))
        return float(np.mean(log_q - np.asarray(self.log_density(x)), dtype=np.float64))
