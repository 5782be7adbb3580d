"""What a training step reads and writes."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from tarflow_jax.distributed import shardings
from tarflow_jax.flow import TarFlow


class TrainState(flax.struct.PyTreeNode):
    """The whole state of a run.

    Attributes:
      step: int32 scalar, steps taken.
      variables: {"params": …} and, in VP mode, {"prior": {"variance": [T, D]}}.
      opt_state: of the optax optimizer.
      ema_params: exponential moving average of the parameters, or None.
    """

    step: jax.Array
    variables: dict[str, Any]
    opt_state: optax.OptState
    ema_params: dict[str, Any] | None

    @property
    def sampling_variables(self) -> dict[str, Any]:
        """The averaged parameters where an average is kept, else the raw ones."""
        if self.ema_params is None:
            return self.variables
        return {**self.variables, "params": self.ema_params}


def initial_state(
    flow: TarFlow, optimizer: optax.GradientTransformation, key: jax.Array, *, ema: bool
) -> TrainState:
    """A new run's state, from the key alone."""
    variables = flow.init(key, jnp.zeros((1, *flow.config.image_shape)))
    variables = {name: variables[name] for name in ("params", "prior") if name in variables}
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        variables=variables,
        opt_state=optimizer.init(params),
        # A copy: the state is donated, and a buffer cannot be donated twice.
        ema_params=jax.tree.map(jnp.copy, params) if ema else None,
    )


def sharded_state(
    flow: TarFlow, optimizer: optax.GradientTransformation, key: jax.Array, mesh: Mesh, *, ema: bool
) -> tuple[TrainState, Any]:
    """(state, shardings), every array made where it will live, never whole on one device."""

    def init(key: jax.Array) -> TrainState:
        return initial_state(flow, optimizer, key, ema=ema)

    layout = shardings(mesh, jax.eval_shape(init, key))
    return jax.jit(init, out_shardings=layout)(key), layout
