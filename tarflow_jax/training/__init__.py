"""Training: the recipe, the task, the state, the step, the loop and its checkpoints."""

from tarflow_jax.training.checkpoint import Checkpoints
from tarflow_jax.training.loop import train
from tarflow_jax.training.recipe import Recipe
from tarflow_jax.training.step import TrainConfig, TrainState, train_step
from tarflow_jax.training.task import FlowTask, Frozen, StudentTask

__all__ = [
    "Checkpoints",
    "FlowTask",
    "Frozen",
    "Recipe",
    "StudentTask",
    "TrainConfig",
    "TrainState",
    "train",
    "train_step",
]
