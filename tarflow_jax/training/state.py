"""What a training step reads and writes."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from tarflow_jax.flow import TarFlow
from tarflow_jax.runtime import shardings


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


def initial_state(flow: TarFlow, optimizer: optax.GradientTransformation, key: jax.Array, *, ema: bool) -> TrainState:
    """A new run's state, from the key alone."""
    # Parameters do not depend on the attention kernel, and the one image cannot be cut over a mesh as splash wants.
    flow = TarFlow(dataclasses.replace(flow.config, attention="plain"))
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


def abstract_state(flow: TarFlow, optimizer: optax.GradientTransformation, mesh: Mesh, *, ema: bool) -> TrainState:
    """The shapes, dtypes and shardings (`jax.ShapeDtypeStruct`) of `sharded_state`'s state, with no array made."""
    shapes = jax.eval_shape(lambda: initial_state(flow, optimizer, jax.random.key(0), ema=ema))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings(mesh, shapes),
    )


def sharded_state(
    flow: TarFlow, optimizer: optax.GradientTransformation, key: jax.Array, mesh: Mesh, *, ema: bool
) -> tuple[TrainState, Any]:
    """(state, shardings), every array made where it will live, never whole on one device."""

    def init(key: jax.Array) -> TrainState:
        return initial_state(flow, optimizer, key, ema=ema)

    layout = shardings(mesh, jax.eval_shape(init, key))
    return jax.jit(init, out_shardings=layout)(key), layout
