"""What a training step reads and writes: its shapes, its initial value, and where each array is placed."""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from tarflow_jax.runtime import shardings
from tarflow_jax.training.optimizer import Optimizer
from tarflow_jax.training.task import Task


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """All that determines the state and the step of a run; hashable, because compiled programs are cached by it.

    Attributes:
      accumulation: microbatches of a step.
    """

    task: Task
    optimizer: Optimizer
    accumulation: int = 1


class TrainState(flax.struct.PyTreeNode):
    """The whole state of a run.

    Attributes:
      step: int32 scalar, steps taken.
      variables: the task's: {"params": …} and, in VP mode, {"prior": {"variance": [T, D]}}.
      opt_state: of the optax optimizer.
      ema_params: exponential moving average of the parameters, or None.
    """

    step: jax.Array
    variables: dict[str, Any]
    opt_state: optax.OptState
    ema_params: dict[str, Any] | None

    @property
    def sampling_variables(self) -> dict[str, Any]:
        """The variables with the averaged parameters, where an average is kept."""
        if self.ema_params is None:
            return self.variables
        return {**self.variables, "params": self.ema_params}


def initial_state(config: TrainConfig, key: jax.Array) -> TrainState:
    """Returns the state before the first step."""
    variables = config.task.init(key)
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        variables=variables,
        opt_state=config.optimizer.transformation().init(params),
        # A copy: the state is donated, and a buffer cannot be donated twice.
        ema_params=jax.tree.map(jnp.copy, params) if config.optimizer.ema_decay else None,
    )


@functools.cache
def abstract_state(config: TrainConfig, mesh: Mesh) -> TrainState:
    """Returns shapes, dtypes and shardings of the state (`jax.ShapeDtypeStruct`), without making an array."""
    shapes = jax.eval_shape(functools.partial(initial_state, config), jax.random.key(0))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings(mesh, shapes),
    )


def new_state(config: TrainConfig, mesh: Mesh, key: jax.Array) -> TrainState:
    """Returns `initial_state`, every array made where it is placed, never whole on one device."""
    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
    return jax.jit(functools.partial(initial_state, config), out_shardings=layout)(key)
