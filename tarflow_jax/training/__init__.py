"""Training: the recipe, the state, the step, the loop and its checkpoints."""

from tarflow_jax.training.checkpoint import Checkpoints
from tarflow_jax.training.loop import train
from tarflow_jax.training.recipe import Recipe
from tarflow_jax.training.state import TrainState
from tarflow_jax.training.step import make_train_step

__all__ = ["Checkpoints", "Recipe", "TrainState", "make_train_step", "train"]
