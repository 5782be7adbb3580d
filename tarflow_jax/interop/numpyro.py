"""Wraps a flow as a NumPyro distribution. Only this module needs NumPyro."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from tarflow_jax.errors import MissingPackageError

try:
    from numpyro.distributions import Distribution, constraints
except ImportError:
    raise MissingPackageError("tarflow_jax.interop.numpyro needs NumPyro; pip install numpyro") from None


class FlowDistribution(Distribution):
    """A trained flow as a prior, as a guide, or to sample from.

    It is a pytree whose leaves include the flow's parameters. Samples are not denoised, so that they follow the density
    of `log_prob`. A noise-conditional flow is evaluated at its highest noise level.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 (NumPyro declares it so)
    pytree_data_fields = ("flow", "condition", "labels")

    def __init__(self, flow: Any, condition: Any = None, labels: Any = None, *, validate_args: bool | None = None):
        """Wraps a flow whose event is one image [H, W, K] or one sequence, [T, D] or [T].

        Args:
          flow: a `TarFlowPipeline`.
          condition: float batch_shape + [C] or, with one per token, batch_shape + [T, C]; None for none.
          labels: int batch_shape, the classes, -1 for none; None for no class.
          validate_args: as in every NumPyro distribution.
        """
        self.flow = flow
        self.condition = None if condition is None else jnp.asarray(condition, jnp.float32)
        self.labels = None if labels is None else jnp.asarray(labels, jnp.int32)
        batches = (values.shape[: values.ndim - dims] for _, values, dims in self._given())
        super().__init__(jnp.broadcast_shapes(*batches), flow.config.data_shape, validate_args=validate_args)

    @property
    def support(self) -> Any:
        return constraints.independent(constraints.real, self.event_dim)

    def sample(self, key: jax.Array, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        """Draws float32 sample_shape + batch_shape + event_shape."""
        shape = (*sample_shape, *self.batch_shape)
        x = self.flow.sample(key, math.prod(shape), denoise=False, **self._rows(shape))
        return x.reshape(*shape, *self.event_shape)

    def log_prob(self, value: jax.Array) -> jax.Array:
        """Returns log p in nats, float32 sample_shape + batch_shape, of values that have event_shape in addition."""
        shape = jnp.broadcast_shapes(value.shape[: value.ndim - self.event_dim], self.batch_shape)
        x = jnp.broadcast_to(value, (*shape, *self.event_shape)).reshape(-1, *self.event_shape)
        return self.flow.log_prob(x, noise_std=self.flow.sampling_noise_std, **self._rows(shape)).reshape(shape)

    def _given(self) -> list[tuple[str, jax.Array, int]]:
        """Returns name, values and number of non-batch dimensions of everything the density is conditional on."""
        dims = {"condition": 1 + self.flow.config.condition_by_token, "labels": 0}
        return [(name, getattr(self, name), dims[name]) for name in dims if getattr(self, name) is not None]

    def _rows(self, shape: tuple[int, ...]) -> dict[str, jax.Array]:
        """Returns the same values by name, broadcast to one row for each element of `shape`."""
        rows = {}
        for name, values, dims in self._given():
            own = values.shape[values.ndim - dims :]
            rows[name] = jnp.broadcast_to(values, (*shape, *own)).reshape(-1, *own)
        return rows
