"""log p(x) of every image of a split: exact on any number of devices, whatever the split's size."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tarflow_jax.data import ImageSource, eval_batches
from tarflow_jax.flow import TarFlow
from tarflow_jax.likelihood import log_prob
from tarflow_jax.noise import Noise
from tarflow_jax.runtime import Rows, replicated, stop_if_requested


def split_log_prob(
    flow: TarFlow,
    variables: dict[str, Any],
    source: ImageSource,
    noise: Noise,
    key: jax.Array,
    *,
    batch_size: int,
    mesh: Mesh,
    num_images: int | None = None,
) -> np.ndarray:
    """log p of each noisy image, float32 [N], nats; on every process the whole array.

    An image's noise depends on the key and the image's place in the split alone. The last batch is padded.

    Args:
      flow: matrix products are done at full precision, whatever the platform's default.
      variables: sharded or not.
      source: the split.
      noise: "uniform" for bits per dimension, or the training noise for the training loss.
      key: of the noise.
      batch_size: the global one; a multiple of the devices that batches are cut over.
      mesh: what the batches are cut over.
      num_images: only the first ones.

    Raises:
      Preempted: see `runtime.PreemptionGuard`.
    """
    rows = Rows(mesh, batch_size)
    total = len(source) if num_images is None else min(num_images, len(source))
    score = _compiled(flow, noise, replicated(mesh))
    results = []
    batches = eval_batches(source, batch_size=batch_size, rows=rows.local)
    for start, batch in zip(range(0, total, batch_size), batches, strict=False):
        stop_if_requested()
        given = map(rows.put, (batch.image, batch.label, (start + rows.local).astype(np.int32)))
        # Read at once: programs with collectives that are under way together can block each other on CPU devices.
        with jax.set_mesh(mesh):  # as in training
            results.append(np.asarray(score(variables, *given, key)))
    return np.concatenate(results)[:total]


@functools.cache
def _compiled(flow: TarFlow, noise: Noise, output: jax.sharding.Sharding) -> Any:
    def score(
        variables: dict[str, Any], images: jax.Array, labels: jax.Array, index: jax.Array, key: jax.Array
    ) -> jax.Array:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)
        noisy = jax.vmap(noise)(keys, images)
        with jax.default_matmul_precision("highest"):
            return log_prob(flow, variables, noisy, labels if flow.config.num_classes else None)

    return jax.jit(score, out_shardings=output)


def loss_of(log_probs: np.ndarray, num_dims: int) -> float:
    """The training loss of a split from its log p: nats per dimension, less ½ log 2π."""
    return float(-log_probs.mean(dtype=np.float64) / num_dims - 0.5 * jnp.log(2 * jnp.pi))
