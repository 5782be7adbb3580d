"""What a training step reads and writes: its shapes, a new one, and where each array is placed."""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from tarflow_jax.errors import UserError
from tarflow_jax.flow import TarFlow, TarFlowConfig
from tarflow_jax.noise import Noise
from tarflow_jax.runtime import shardings
from tarflow_jax.student import Student, StudentConfig
from tarflow_jax.training.optimizer import Optimizer


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """All that determines the state and the step of a run; hashable, so that compiled programs are known by it.

    Attributes:
      model, noise, optimizer: of the recipe.
      drop_label: probability of training an image without its label.
      accumulation: microbatches of a step.
      student: what is trained, by the flow that `model` and `noise` tell of; None where that flow is.

    Raises ValueError: noise levels that the model is not told, or the other way round.
    """

    model: TarFlowConfig
    noise: Noise
    optimizer: Optimizer
    drop_label: float = 0.0
    accumulation: int = 1
    student: StudentConfig | None = None

    def __post_init__(self) -> None:
        if self.model.noise_conditional != (self.noise.kind == "levels"):
            raise UserError(
                f"model.noise_conditional is {self.model.noise_conditional} with noise.kind {self.noise.kind!r}; "
                "expected True with 'levels', False otherwise"
            )
        if self.student:
            self.student.check_flow(self.model)


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


def initial_state(config: TrainConfig, key: jax.Array) -> TrainState:
    """The state before the first step."""
    # Parameters do not depend on the attention kernel, and splash cannot shard the one image over a mesh.
    image = jnp.zeros((1, *config.model.image_shape))
    if config.student:
        shape = dataclasses.replace(config.student.shape, attention="plain")
        variables = Student(dataclasses.replace(config.student, shape=shape)).init(key, image)
    else:
        flow = TarFlow(dataclasses.replace(config.model, attention="plain"))
        variables = flow.init(key, image, noise_std=jnp.ones(1))
    variables = {name: variables[name] for name in ("params", "prior") if name in variables}
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
    """Shapes, dtypes and shardings (`jax.ShapeDtypeStruct`) of the state, with no array made."""
    shapes = jax.eval_shape(functools.partial(initial_state, config), jax.random.key(0))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings(mesh, shapes),
    )


def new_state(config: TrainConfig, mesh: Mesh, key: jax.Array) -> TrainState:
    """`initial_state`, every array made where it is placed, never whole on one device."""
    layout = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
    return jax.jit(functools.partial(initial_state, config), out_shardings=layout)(key)
